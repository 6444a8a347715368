//! The binary under test: started on a free port with a data folder of its own, killed when nobody needs it any more.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client;

pub struct Server {
    pub address: SocketAddr,
    /// The base model's card.
    pub base: Value,
    child: Child,
    pub data: Arc<tempfile::TempDir>,
    log: PathBuf,
}

impl Server {
    /// One server for the tests that leave nothing behind that others could see.
    pub fn shared() -> Arc<Server> {
        static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        shared.upgrade().unwrap_or_else(|| {
            let server = Arc::new(Server::start(&[
                "--lora-root",
                std::env::temp_dir().to_str().unwrap(),
            ]));
            *shared = Arc::downgrade(&server);
            server
        })
    }

    pub fn start(flags: &[&str]) -> Server {
        Server::start_in(Arc::new(tempfile::tempdir().unwrap()), flags)
    }

    /// On the data folder of a server that was killed.
    pub fn start_in(data: Arc<tempfile::TempDir>, flags: &[&str]) -> Server {
        Server::start_with(data, &[], flags)
    }

    /// With variables of its own.
    pub fn start_with(
        data: Arc<tempfile::TempDir>,
        variables: &[(String, String)],
        flags: &[&str],
    ) -> Server {
        let model = std::env::var("TANDEM_TEST_MODEL").ok();
        let model = model.iter().flat_map(|model| ["--model", model]);
        let args: Vec<&str> = ["serve", "--port", "0"]
            .into_iter()
            .chain(flags.iter().copied())
            .chain(model)
            .collect();
        let mut server = Server::spawn(data, "log", variables, &args);
        if !flags.iter().any(|flag| flag.starts_with("--api-key")) {
            server.base = client::get(server.address, "/v1/models").ok()["data"][0].clone();
        }
        server
    }

    /// On another model than the tests' own.
    pub fn serving(model: &Path, flags: &[&str]) -> Server {
        let data = Arc::new(tempfile::tempdir().unwrap());
        let model = model.to_str().unwrap();
        let args = [&["serve", model, "--port", "0"], flags].concat();
        let mut server = Server::spawn(data, "log", &[], &args);
        server.base = client::get(server.address, "/v1/models").ok()["data"][0].clone();
        server
    }

    /// One replica. `listen`: its address, or port 0.
    pub fn backend(data: Arc<tempfile::TempDir>, log: &str, listen: &str) -> Server {
        Server::spawn(data, log, &[], &["backend", "--listen", listen])
    }

    pub fn router(data: Arc<tempfile::TempDir>, backends: &[SocketAddr]) -> Server {
        let urls: Vec<String> = backends
            .iter()
            .map(|address| format!("http://{address}"))
            .collect();
        let mut server = Server::spawn(
            data,
            "log",
            &[],
            &["router", "--port", "0", "--backend", &urls.join(",")],
        );
        server.base = client::get(server.address, "/v1/models").ok()["data"][0].clone();
        server
    }

    fn spawn(
        data: Arc<tempfile::TempDir>,
        log: &str,
        variables: &[(String, String)],
        args: &[&str],
    ) -> Server {
        let log = data.path().join(log);
        let mut child = command(args)
            .arg("--data-dir")
            .arg(data.path().join("data"))
            .envs(variables.iter().cloned())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .expect("the binary is built: cargo build --release");
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line
            .trim()
            .rsplit('/')
            .next()
            .and_then(|address| address.parse().ok());
        let Some(address) = address else {
            drop(child.kill());
            let log = std::fs::read_to_string(log).unwrap();
            panic!("{args:?} did not start: {line:?}\n{log}");
        };
        Server {
            address,
            base: Value::Null,
            child,
            data,
            log,
        }
    }

    pub fn model(&self) -> &str {
        self.base["id"].as_str().unwrap()
    }

    pub fn max_model_len(&self) -> usize {
        self.base["max_model_len"].as_u64().unwrap() as usize
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// No goodbye.
    pub fn kill(mut self) -> Arc<tempfile::TempDir> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.data.clone()
    }

    pub fn terminate(&mut self) -> ExitStatus {
        let status = Command::new("kill")
            .args(["-TERM", &self.pid().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
        self.child.wait().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The binary under test.
pub fn binary() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/tandem");
    std::env::var_os("TANDEM_BINARY").map_or(built, PathBuf::from)
}

/// `tandem` with these arguments.
pub fn command(args: &[&str]) -> Command {
    let mut command = without_options(Command::new(binary()));
    command.args(args);
    command
}

/// The developer's own environment may hold options of the binary.
pub fn without_options(mut command: Command) -> Command {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TANDEM_") {
            command.env_remove(name);
        }
    }
    command
}

/// Polls until `look` finds something; what is tested must not need longer than two minutes.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            start.elapsed() < Duration::from_secs(120),
            "{what} did not happen in two minutes"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}
