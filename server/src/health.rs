//! `tandem health`: one GET /health or /ready over plain TCP, for container health checks. Not here: an HTTP client.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::cli::Health;

const TIMEOUT: Duration = Duration::from_secs(5);

/// The status line of the answer.
pub fn ask(Health { host, port, ready }: &Health) -> std::io::Result<String> {
    let address = SocketAddr::new(*host, *port);
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let path = if *ready { "/ready" } else { "/health" };
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    stream.take(64 << 10).read_to_end(&mut answer)?;
    let text = String::from_utf8_lossy(&answer);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

pub fn is_well(status_line: &str) -> bool {
    status_line.split(' ').nth(1) == Some("200")
}
