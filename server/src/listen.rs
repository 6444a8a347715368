//! The socket and its end: accepts connections until a signal, gives running answers time, then stops the router. Who
//! holds too many connections gets no more. Not here: routes, what a connection may take (connection), the engine.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tracing::{info, warn};

use crate::app::App;
use crate::connection::{self, ConnectionId, Site};
use crate::process;

/// Descriptors for everything but connections: the database, files, adapters, the engine's own.
const OWN_DESCRIPTORS: u64 = 256;
/// After a socket that could not be accepted: there may be no descriptor for it.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// Between two lines of the log about clients that were refused a connection.
const LOG_PERIOD: Duration = Duration::from_secs(60);

/// Connections at a time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub all: u32,
    /// From one address; of IPv6 from one network of 64 bits.
    pub per_address: u32,
}

/// Bound before the model is loaded, so that a taken port is found in milliseconds.
pub fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves until SIGTERM or SIGINT and `grace` after it; a second signal ends the grace.
pub async fn serve(
    listener: std::net::TcpListener,
    site: Site,
    app: App,
    limits: Limits,
    grace: Duration,
) -> io::Result<()> {
    let mut signals = Signals::new()?;
    let listener = TcpListener::from_std(listener)?;
    let (stop, stopping) = watch::channel(false);
    let mut server = tokio::spawn(accept(listener, site, limits, stopping));
    let name = signals.next().await;
    info!(
        signal = name,
        grace_s = grace.as_secs(),
        "stopping: no new connections, running answers end"
    );
    app.stop();
    stop.send_replace(true);
    tokio::select! {
        _ = &mut server => {}
        () = tokio::time::sleep(grace) => warn!("the grace is over; answers that still run are cut"),
        name = signals.next() => warn!(signal = name, "a second signal; answers that still run are cut"),
    }
    app.router.shutdown().await;
    Ok(())
}

/// As many connections as there are descriptors for.
fn affordable(limits: Limits) -> Limits {
    let room = process::descriptors().saturating_sub(OWN_DESCRIPTORS).max(16);
    let all = u32::try_from(room).unwrap_or(u32::MAX).min(limits.all);
    if all == limits.all {
        return limits;
    }
    // Another address finds a place, whatever one does.
    let per_address = limits.per_address.min(all.div_ceil(2));
    warn!(
        max_connections = limits.all,
        "the limit on open files (ulimit -n) has room for {all} connections, {per_address} of one address"
    );
    Limits { all, per_address }
}

/// Until `stopping`, and until the connections that are open then have ended.
pub async fn accept(listener: TcpListener, site: Site, limits: Limits, mut stopping: watch::Receiver<bool>) {
    let limits = affordable(limits);
    let places = Arc::new(Semaphore::new(limits.all as usize));
    let addresses = Addresses::default();
    let mut refused = Refused::default();
    for id in 0.. {
        let next = async {
            let place = places.clone().acquire_owned().await.expect("it is never closed");
            (place, next(&listener).await)
        };
        let (place, (stream, peer)) = tokio::select! {
            next = next => next,
            _ = stopping.wait_for(|stops| *stops) => break,
        };
        let Some(caller) = addresses.enter(peer.ip(), limits.per_address) else {
            refused.say(peer.ip());
            continue;
        };
        let served = connection::begin(stream, ConnectionId(id), site.clone(), stopping.clone());
        tokio::spawn(async move {
            served.await;
            drop((place, caller));
        });
    }
    drop(listener);
    // When all places are free, nobody is connected.
    drop(places.acquire_many(limits.all).await);
}

async fn next(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                // A chunk of a stream is small and must leave at once.
                if let Err(error) = stream.set_nodelay(true) {
                    warn!(%error, "cannot set TCP_NODELAY");
                }
                return (stream, peer);
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Connections of each address that has some.
#[derive(Clone, Default)]
struct Addresses(Arc<Mutex<HashMap<IpAddr, u32>>>);

/// Counted until it is dropped.
struct Caller {
    addresses: Addresses,
    address: IpAddr,
}

impl Addresses {
    fn enter(&self, address: IpAddr, limit: u32) -> Option<Caller> {
        let address = network(address);
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(address).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(Caller {
            addresses: self.clone(),
            address,
        })
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let mut open = self.addresses.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.address);
            }
        }
    }
}

/// Who has one IPv6 address has its whole network of 64 bits.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) if !address.is_loopback() => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)))
        }
        address => address,
    }
}

/// Says now and then that connections were refused.
#[derive(Default)]
struct Refused {
    count: u64,
    said: Option<Instant>,
}

impl Refused {
    fn say(&mut self, address: IpAddr) {
        self.count += 1;
        if self.said.is_none_or(|said| said.elapsed() > LOG_PERIOD) {
            self.said = Some(Instant::now());
            warn!(
                %address,
                refused = self.count,
                "an address has as many connections as it may have (--max-connections-per-address); more are closed"
            );
        }
    }
}

pub const SIGINT: &str = "SIGINT";
pub const SIGTERM: &str = "SIGTERM";

/// SIGTERM and SIGINT, from now on.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub fn new() -> io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => SIGTERM,
            _ = self.interrupt.recv() => SIGINT,
        }
    }
}

#[cfg(test)]
mod tests;
