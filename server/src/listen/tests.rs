//! Clients that hold a connection and do nothing with it, over real sockets.

use std::time::Duration;

use axum::Router as Routes;
use axum::body::{Body, Bytes};
use axum::routing::{get, post};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use super::*;
use crate::connection::{Patience, RootPath};
use crate::unread;

const MOMENT: Duration = Duration::from_millis(200);
/// Long enough that nobody waits for it here.
const LONG: Duration = Duration::from_secs(600);

const PATIENT: Patience = Patience {
    idle: LONG,
    read: LONG,
    write: LONG,
};

/// `/stream` writes as long as somebody reads, and says by the channel when it was dropped. `/read` reads a body.
async fn started(limits: Limits, patience: Patience) -> (SocketAddr, mpsc::UnboundedReceiver<()>) {
    let (dropped, drops) = mpsc::unbounded_channel();
    let stream = move || async move {
        let guard = Guard(dropped);
        let chunks = futures::stream::repeat_with(move || {
            let _held = &guard;
            Ok::<_, io::Error>(Bytes::from(vec![b'x'; 1 << 16]))
        });
        Body::from_stream(chunks)
    };
    let read = async |body: Body| match axum::body::to_bytes(body, 1 << 20).await {
        Ok(_) => "all",
        Err(_) => "cut",
    };
    let routes = Routes::new()
        .route("/stream", get(stream))
        .route("/read", post(read))
        .layer(axum::middleware::from_fn_with_state(patience.read, unread::drain));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopping) = watch::channel(false);
    tokio::spawn(async move {
        let site = Site {
            routes,
            root: RootPath::new("/").unwrap(),
            tls: None,
            patience,
        };
        accept(listener, site, limits, stopping).await;
        drop(stop);
    });
    (address, drops)
}

#[derive(Clone)]
struct Guard(mpsc::UnboundedSender<()>);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

const LIMITS: Limits = Limits {
    all: 100,
    per_address: 100,
};

async fn sent(address: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    socket
}

/// All that is said until the connection is closed.
async fn heard(mut socket: TcpStream) -> String {
    let mut text = Vec::new();
    // A reset is an end, too.
    let _ = socket.read_to_end(&mut text).await;
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test]
async fn who_begins_no_request_is_closed() {
    for patience in [
        Patience {
            read: MOMENT,
            ..PATIENT
        },
        Patience {
            idle: MOMENT,
            ..PATIENT
        },
    ] {
        let (address, _drops) = started(LIMITS, patience).await;
        for said in [
            &b""[..],
            b"GET /stream HTTP/1.1\r\nhost: x\r\n",
            // HTTP/2 that goes on asking whether the server lives.
            &[PREFACE, PING, PING].concat(),
        ] {
            let rest = heard(sent(address, said).await).await;
            assert!(!rest.contains("xxx"), "{rest}");
        }
    }
    let patience = Patience {
        idle: MOMENT,
        ..PATIENT
    };
    let (address, _drops) = started(LIMITS, patience).await;
    let whole = b"POST /read HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nab";
    let said = heard(sent(address, whole).await).await;
    assert!(said.ends_with("all"), "after a request the same: {said}");
}

#[tokio::test]
async fn a_body_that_does_not_come_is_given_up() {
    let patience = Patience {
        read: MOMENT,
        ..PATIENT
    };
    let (address, _drops) = started(LIMITS, patience).await;
    let begun = b"POST /read HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\nconnection: close\r\n\r\nab";
    let said = heard(sent(address, begun).await).await;
    assert!(said.ends_with("cut"), "{said}");
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\0\0";
const PING: &[u8] = b"\0\0\x08\x06\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// GET /stream on stream 1: the first seven bytes of the block are indices, then a path as a literal.
const HEADERS: &[u8] = b"\0\0\x10\x01\x05\0\0\0\x01\x82\x86\x41\x01x\x04\x07/stream\x00";

#[tokio::test]
async fn who_takes_nothing_in_is_given_up_in_both_versions() {
    // The last byte pads to nothing: the block is fifteen bytes long.
    let headers = [&HEADERS[..2], &[14], &HEADERS[3..HEADERS.len() - 1]].concat();
    let block = headers.len() - 9;
    assert_eq!(block, usize::from(headers[2]));
    let patience = Patience {
        write: MOMENT,
        ..PATIENT
    };
    let (address, mut drops) = started(LIMITS, patience).await;
    for said in [
        &b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n"[..],
        // A window of 0 bytes for each stream, on a connection that is well.
        &[PREFACE, &headers].concat(),
    ] {
        let socket = sent(address, said).await;
        drops.recv().await.unwrap();
        drop(socket);
    }
}

#[tokio::test]
async fn an_address_has_only_so_many_connections() {
    let limits = Limits {
        all: 100,
        per_address: 2,
    };
    let (address, _drops) = started(limits, PATIENT).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut socket = sent(address, b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n").await;
        socket.read_exact(&mut [0; 8]).await.unwrap();
        held.push(socket);
    }
    assert_eq!(heard(sent(address, b"GET").await).await, "");
    // Whoever leaves makes room.
    held.pop();
    loop {
        let mut socket = TcpStream::connect(address).await.unwrap();
        let asked = socket.write_all(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n").await;
        if asked.is_ok() && socket.read_exact(&mut [0; 8]).await.is_ok() {
            break;
        }
    }
}

#[test]
fn an_ipv6_network_is_one_address() {
    for (one, other, same) in [
        ("2001:db8::1", "2001:db8::2", true),
        ("2001:db8::1", "2001:db8:0:1::1", false),
        ("::ffff:10.0.0.1", "10.0.0.1", true),
        ("10.0.0.1", "10.0.0.2", false),
    ] {
        let [one, other] = [one, other].map(|text| network(text.parse().unwrap()));
        assert_eq!(one == other, same, "{one} {other}");
    }
}
