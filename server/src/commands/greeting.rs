//! What a command that serves says on standard output when it is ready. The first line is for scripts and tests, which
//! wait for it; the others are for people. Not here: the log, which goes to standard error.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tandem_core::replica::ReplicaInfo;

pub struct Greeting<'a> {
    pub address: SocketAddr,
    pub names: &'a [String],
    pub replica: &'a ReplicaInfo,
    pub door: Door,
}

pub enum Door {
    Api { is_secure: bool, wants_key: bool },
    Grpc { is_secure: bool },
}

impl Greeting<'_> {
    pub fn say(&self) {
        // In one write: who waits for the first line only may have closed the pipe, and that is no reason to stop.
        let mut out = io::stdout().lock();
        let _ = out.write_all(self.text().as_bytes());
        let _ = out.flush();
    }

    fn text(&self) -> String {
        let Greeting {
            address,
            names,
            replica,
            door,
        } = self;
        let ReplicaInfo {
            max_model_len,
            max_num_seqs,
            dtype,
            device,
            tensor_parallel_size,
            parameters,
            weight_bytes,
            kv_blocks,
            kv_bytes,
            ..
        } = replica;
        let scheme = match door {
            Door::Api { is_secure, .. } | Door::Grpc { is_secure } if *is_secure => "https",
            Door::Api { .. } | Door::Grpc { .. } => "http",
        };
        let mut text = format!("tandem is listening on {scheme}://{address}\n");
        let mut say = |name: &str, value: String| {
            writeln!(text, "  {name:<9} {value}").expect("a String takes any text");
        };
        let ranks = match tensor_parallel_size {
            1 => String::new(),
            ranks => format!(", {ranks} ranks"),
        };
        let size = tandem_backend::size;
        say(
            "model",
            format!(
                "{}: {} parameters in {dtype} ({}) on {device}{ranks}",
                names.join(", "),
                count(*parameters),
                size(*weight_bytes)
            ),
        );
        let kv_tokens = replica.tokens_in(*kv_blocks);
        say(
            "KV cache",
            format!(
                "{kv_tokens} tokens ({}); {max_num_seqs} sequences at once, of {max_model_len} tokens at most",
                size(*kv_bytes)
            ),
        );
        let base = format!("{scheme}://{}", reachable(*address));
        match door {
            Door::Grpc { .. } => say("routers", format!("tandem router --backend {base}")),
            Door::Api { wants_key, .. } => {
                say("page", format!("{base}/"));
                let key = if *wants_key { ", with an API key" } else { "" };
                say("API", format!("{base}/v1{key}; described at {base}/docs"));
            }
        }
        say("stop", "Ctrl-C".to_owned());
        text
    }
}

/// An address that a browser on this machine can open.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// 1.24B, 135M, 1.84M.
fn count(n: u64) -> String {
    let (unit, of) = match n {
        ..1_000 => return n.to_string(),
        1_000..1_000_000 => ("K", 1e3),
        1_000_000..1_000_000_000 => ("M", 1e6),
        _ => ("B", 1e9),
    };
    let number = n as f64 / of;
    let decimals = match number {
        ..10.0 => 2,
        ..100.0 => 1,
        _ => 0,
    };
    format!("{number:.decimals$}{unit}")
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tandem_core::id::Digest;

    use super::*;

    fn replica() -> ReplicaInfo {
        ReplicaInfo {
            model_folder: PathBuf::new(),
            base_digest: Digest([0; 32]),
            vocab_size: 1,
            hidden_size: 192,
            max_model_len: 512,
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            dtype: "bfloat16".to_owned(),
            device: "cpu".to_owned(),
            tensor_parallel_size: 2,
            parameters: 1_838_208,
            weight_bytes: 3_676_416,
            kv_blocks: 1024,
            block_size: 32,
            kv_tokens: 32_768,
            kv_bytes: 64 << 20,
            max_loras: 1,
            max_training_jobs: 1,
            max_lora_rank: 1,
            lora_targets: Vec::new(),
            lora_sizes: Default::default(),
            eos_tokens: Vec::new(),
            grammars: true,
        }
    }

    #[test]
    fn the_first_line_is_for_scripts_and_the_rest_for_people() {
        let text = |address: &str, door| {
            let greeting = Greeting {
                address: address.parse().expect("an address"),
                names: &["a".to_owned(), "b".to_owned()],
                replica: &replica(),
                door,
            };
            greeting.text()
        };
        let api = text(
            "0.0.0.0:8000",
            Door::Api {
                is_secure: false,
                wants_key: true,
            },
        );
        assert_eq!(
            api,
            "tandem is listening on http://0.0.0.0:8000\n  \
             model     a, b: 1.84M parameters in bfloat16 (3.51 MiB) on cpu, 2 ranks\n  \
             KV cache  32768 tokens (64.0 MiB); 64 sequences at once, of 512 tokens at most\n  \
             page      http://127.0.0.1:8000/\n  \
             API       http://127.0.0.1:8000/v1, with an API key; described at http://127.0.0.1:8000/docs\n  \
             stop      Ctrl-C\n"
        );
        let grpc = text("[::1]:8001", Door::Grpc { is_secure: false });
        assert!(
            grpc.contains("tandem router --backend http://[::1]:8001\n"),
            "{grpc}"
        );
        assert_eq!(
            [999, 135_000_000, 70_600_000_000].map(count),
            ["999", "135M", "70.6B"]
        );
    }
}
