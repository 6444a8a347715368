//! A client that sends what it is told, however wrong, and reads whole answers. Not here: any help from HTTP crates.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// Nothing that is tested takes longer, on a busy machine with two cores.
const TIMEOUT: Duration = Duration::from_secs(120);

pub struct Reply {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {:?}", self.text()))
    }

    /// Null where there is none.
    pub fn json_or_null(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// The JSON of a 200.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }

    /// The data of a stream's events; the last must be `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        let text = self.text();
        let mut events: Vec<&str> = text
            .split("\n\n")
            // A comment breaks the silence while a request waits.
            .filter(|event| !event.is_empty() && !event.starts_with(':'))
            .map(|event| {
                event
                    .strip_prefix("data: ")
                    .unwrap_or_else(|| panic!("{event:?}"))
            })
            .collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events
            .into_iter()
            .map(|event| serde_json::from_str(event).unwrap())
            .collect()
    }
}

impl Reply {
    /// The data of a stream whose events have names, which the data says as well.
    pub fn named_events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        let text = self.text();
        let events = text
            .split("\n\n")
            .filter(|event| !event.is_empty() && !event.starts_with(':'));
        let event = |event: &str| {
            let (name, data) = event.split_once('\n').unwrap_or_else(|| panic!("{event:?}"));
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(name, format!("event: {}", data["type"].as_str().unwrap()));
            data
        };
        events.map(event).collect()
    }
}

pub fn get(address: SocketAddr, path: &str) -> Reply {
    send(address, "GET", path, &[], b"")
}

pub fn delete(address: SocketAddr, path: &str) -> Reply {
    send(address, "DELETE", path, &[], b"")
}

pub fn post(address: SocketAddr, path: &str, body: &Value) -> Reply {
    send(
        address,
        "POST",
        path,
        &[("content-type", "application/json")],
        body.to_string().as_bytes(),
    )
}

/// A multipart form; a field with a file name is a file.
pub fn form(address: SocketAddr, path: &str, fields: &[(&str, Option<&str>, &[u8])]) -> Reply {
    const BOUNDARY: &str = "tandem-test-boundary";
    let mut body = Vec::new();
    for (name, filename, content) in fields {
        let filename = filename.map_or_else(String::new, |name| format!("; filename=\"{name}\""));
        write!(
            body,
            "--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"{name}\"{filename}\r\n\r\n"
        )
        .unwrap();
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    write!(body, "--{BOUNDARY}--\r\n").unwrap();
    let content_type = format!("multipart/form-data; boundary={BOUNDARY}");
    send(address, "POST", path, &[("content-type", &content_type)], &body)
}

pub fn upload(address: SocketAddr, filename: &str, content: &[u8]) -> Reply {
    form(
        address,
        "/v1/files",
        &[("purpose", None, b"fine-tune"), ("file", Some(filename), content)],
    )
}

pub fn send(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    let length = body.len().to_string();
    let mut all = vec![
        ("host", "tandem"),
        ("connection", "close"),
        ("content-length", length.as_str()),
    ];
    // A length that the test gives stands for the true one.
    all.retain(|(name, _)| headers.iter().all(|(given, _)| given != name));
    all.extend_from_slice(headers);
    let mut head = format!("{method} {path} HTTP/1.1\r\n");
    all.iter()
        .for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
    raw(address, &[head.as_bytes(), b"\r\n", body].concat())
}

/// These very bytes.
pub fn raw(address: SocketAddr, request: &[u8]) -> Reply {
    let mut stream = connect(address);
    // A server that refuses early may close before it has read everything; what it said is what counts.
    let _ = stream.write_all(request);
    read(&mut BufReader::new(stream))
}

/// One request after the other on one connection, as long as the server keeps it.
pub fn in_turn(address: SocketAddr, requests: &[Vec<u8>]) -> Vec<Reply> {
    let mut stream = BufReader::new(connect(address));
    let answer = |request: &Vec<u8>| {
        stream.get_mut().write_all(request).unwrap();
        read(&mut stream)
    };
    requests.iter().map(answer).collect()
}

pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.set_write_timeout(Some(TIMEOUT)).unwrap();
    stream
}

fn read(stream: &mut BufReader<TcpStream>) -> Reply {
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.unwrap_or_else(|| panic!("not a status line: {line:?}"));
    let mut headers = Vec::new();
    loop {
        line.clear();
        stream.read_line(&mut line).unwrap();
        match line.trim_end().split_once(':') {
            Some((name, value)) => headers.push((name.to_ascii_lowercase(), value.trim().to_owned())),
            None => break,
        }
    }
    let mut reply = Reply {
        status,
        headers,
        body: Vec::new(),
    };
    if reply.header("transfer-encoding") == Some("chunked") {
        reply.body = chunks(stream);
    } else if let Some(length) = reply.header("content-length") {
        reply.body.resize(length.parse().unwrap(), 0);
        stream.read_exact(&mut reply.body).unwrap();
    } else {
        stream.read_to_end(&mut reply.body).unwrap();
    }
    reply
}

fn chunks(stream: &mut BufReader<TcpStream>) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        let size =
            usize::from_str_radix(line.trim(), 16).unwrap_or_else(|_| panic!("not a chunk size: {line:?}"));
        let start = body.len();
        body.resize(start + size, 0);
        stream.read_exact(&mut body[start..]).unwrap();
        stream.read_line(&mut line).unwrap();
        if size == 0 {
            return body;
        }
    }
}
