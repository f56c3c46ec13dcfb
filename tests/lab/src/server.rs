//! What runs in a pod: an HTTP server and a UDP echo on the same port, both families, that say which pod they are.
use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, Query, State};
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use tokio::net::{TcpListener, UdpSocket};

use crate::topology::PORT;

/// Headers of every answer: which pod gave it, and who it believes asked.
pub const POD: &str = "x-pod";
pub const PEER: &str = "x-peer";

/// Answer HTTP requests and UDP datagrams with this pod's name.
#[derive(clap::Args)]
pub struct Options {
    #[arg(long)]
    name: String,
    #[arg(long, default_value_t = PORT)]
    port: u16,
}

#[tokio::main(flavor = "current_thread")]
pub async fn run(options: &Options) -> Result<()> {
    let name: &'static str = options.name.clone().leak();
    // Both families: IPv4 clients appear as mapped addresses.
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, options.port));
    let udp = UdpSocket::bind(address).await.with_context(|| format!("cannot bind UDP {address}"))?;
    tokio::spawn(echo(name, udp));

    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    let routes = Router::new()
        .route("/", get(hostname))
        .route("/slow", get(slow))
        .route("/bytes", get(bytes))
        .route("/echo", post(|body: Bytes| async { body }))
        .layer(axum::middleware::from_fn_with_state(name, sign))
        .with_state(name);
    axum::serve(listener, routes.into_make_service_with_connect_info::<SocketAddr>()).await?;
    Ok(())
}

async fn hostname(State(name): State<&'static str>, ConnectInfo(peer): ConnectInfo<SocketAddr>) -> String {
    format!("{name} {}\n", canonical(peer))
}

#[derive(Deserialize)]
struct Slow {
    ms: u64,
}

async fn slow(State(name): State<&'static str>, Query(slow): Query<Slow>) -> String {
    tokio::time::sleep(Duration::from_millis(slow.ms)).await;
    format!("{name}\n")
}

#[derive(Deserialize)]
struct Size {
    n: usize,
}

async fn bytes(Query(size): Query<Size>) -> Vec<u8> {
    vec![b'x'; size.n]
}

async fn sign(
    State(name): State<&'static str>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Response {
    let mut response = next.run(request).await.into_response();
    response.headers_mut().insert(POD, HeaderValue::from_static(name));
    if let Ok(peer) = HeaderValue::try_from(canonical(peer).to_string()) {
        response.headers_mut().insert(PEER, peer);
    }
    response
}

fn canonical(peer: SocketAddr) -> SocketAddr {
    SocketAddr::new(peer.ip().to_canonical(), peer.port())
}

async fn echo(name: &str, socket: UdpSocket) {
    let mut datagram = vec![0; 65536];
    loop {
        // An ICMP error about an earlier answer is reported here, and concerns no other client.
        let Ok((length, peer)) = socket.recv_from(&mut datagram).await else { continue };
        let mut answer = format!("{name} {} ", canonical(peer)).into_bytes();
        answer.extend_from_slice(&datagram[..length]);
        let _ = socket.send_to(&answer, peer).await;
    }
}
