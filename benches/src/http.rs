//! HTTP/1.1 over a plain socket, for loopback: one request per connection, replies whole or as server-sent events. Not
//! a general client: no TLS, no redirects, no keep-alive.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Nothing on the wire for this long fails the request.
const SILENCE: Duration = Duration::from_secs(300);

#[derive(Clone)]
pub struct Server {
    /// `127.0.0.1:8000`
    address: String,
    api_key: Option<String>,
}

pub struct Body<'a> {
    pub content_type: &'a str,
    pub bytes: Vec<u8>,
}

impl Body<'_> {
    pub fn json(value: &Value) -> Body<'static> {
        Body {
            content_type: "application/json",
            bytes: value.to_string().into_bytes(),
        }
    }
}

impl Server {
    pub fn new(url: &str, api_key: Option<String>) -> anyhow::Result<Server> {
        let address = url
            .strip_prefix("http://")
            .context("only http:// is spoken here")?
            .trim_end_matches('/');
        ensure!(
            !address.contains('/'),
            "{url} has a path; give the server's address only"
        );
        let port = if address.contains(':') { "" } else { ":80" };
        Ok(Server {
            address: format!("{address}{port}"),
            api_key,
        })
    }

    pub async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.send("GET", path, None).await?.json().await
    }

    pub async fn post(&self, path: &str, body: Body<'_>) -> anyhow::Result<Value> {
        self.send("POST", path, Some(body)).await?.json().await
    }

    /// The reply's events, to be read one by one.
    pub async fn stream(&self, path: &str, body: Body<'_>) -> anyhow::Result<Events> {
        let mut reply = self.send("POST", path, Some(body)).await?;
        if reply.status != 200 {
            reply.json().await?;
        }
        Ok(Events { reply, line: vec![] })
    }

    async fn send(&self, method: &str, path: &str, body: Option<Body<'_>>) -> anyhow::Result<Reply> {
        let mut socket = timeout(SILENCE, TcpStream::connect(&self.address)).await??;
        socket.set_nodelay(true)?;
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n",
            self.address
        );
        if let Some(key) = &self.api_key {
            head += &format!("authorization: Bearer {key}\r\n");
        }
        if let Some(Body { content_type, bytes }) = &body {
            head += &format!(
                "content-type: {content_type}\r\ncontent-length: {}\r\n",
                bytes.len()
            );
        }
        let mut request = (head + "\r\n").into_bytes();
        request.extend(body.map(|body| body.bytes).unwrap_or_default());
        socket.write_all(&request).await?;
        Reply::begin(BufReader::new(socket)).await
    }
}

struct Reply {
    status: u16,
    /// Bytes of the present chunk still to come; `None` when the body ends with the connection.
    chunk_left: Option<usize>,
    ended: bool,
    socket: BufReader<TcpStream>,
}

impl Reply {
    async fn begin(mut socket: BufReader<TcpStream>) -> anyhow::Result<Reply> {
        let status_line = header(&mut socket).await?;
        let status = status_line
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        let status = status.with_context(|| format!("{status_line:?} is no HTTP status line"))?;
        let mut chunked = false;
        loop {
            let line = header(&mut socket).await?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            chunked |= line.starts_with("transfer-encoding:") && line.contains("chunked");
        }
        Ok(Reply {
            status,
            chunk_left: chunked.then_some(0),
            ended: false,
            socket,
        })
    }

    /// The next bytes of the body, empty at its end.
    async fn read(&mut self) -> anyhow::Result<Vec<u8>> {
        if self.ended {
            return Ok(vec![]);
        }
        if self.chunk_left == Some(0) {
            let size = header(&mut self.socket).await?;
            let size = usize::from_str_radix(size.split(';').next().unwrap_or_default().trim(), 16);
            self.chunk_left = Some(size.context("a chunk's size is no hexadecimal number")?);
            if self.chunk_left == Some(0) {
                self.ended = true;
                return Ok(vec![]);
            }
        }
        let mut bytes = vec![0; self.chunk_left.unwrap_or(16 * 1024).min(16 * 1024)];
        let n = timeout(SILENCE, self.socket.read(&mut bytes)).await??;
        bytes.truncate(n);
        match &mut self.chunk_left {
            Some(left) => {
                ensure!(n > 0, "the connection closed inside a chunk");
                *left -= n;
                if *left == 0 {
                    header(&mut self.socket).await?;
                }
            }
            None => self.ended = n == 0,
        }
        Ok(bytes)
    }

    async fn json(&mut self) -> anyhow::Result<Value> {
        let mut body = vec![];
        loop {
            let bytes = self.read().await?;
            if bytes.is_empty() {
                break;
            }
            body.extend(bytes);
        }
        let text = String::from_utf8_lossy(&body);
        if self.status != 200 {
            bail!(
                "status {}: {}",
                self.status,
                text.chars().take(300).collect::<String>()
            );
        }
        serde_json::from_slice(&body)
            .with_context(|| format!("no JSON: {}", text.chars().take(300).collect::<String>()))
    }
}

async fn header(socket: &mut BufReader<TcpStream>) -> anyhow::Result<String> {
    let mut line = String::new();
    ensure!(
        timeout(SILENCE, socket.read_line(&mut line)).await?? > 0,
        "the connection closed early"
    );
    Ok(line.trim_end().to_owned())
}

/// `data:` lines of a text/event-stream.
pub struct Events {
    reply: Reply,
    line: Vec<u8>,
}

impl Events {
    /// The next event's data; `None` after `[DONE]` or the end of the body.
    pub async fn next(&mut self) -> anyhow::Result<Option<Value>> {
        loop {
            while let Some(end) = self.line.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.line.drain(..=end).collect();
                let Some(data) = std::str::from_utf8(&line)?.strip_prefix("data:") else {
                    continue;
                };
                match data.trim() {
                    "[DONE]" => return Ok(None),
                    data => return Ok(Some(serde_json::from_str(data)?)),
                }
            }
            let bytes = self.reply.read().await?;
            if bytes.is_empty() {
                return Ok(None);
            }
            self.line.extend(bytes);
        }
    }
}
