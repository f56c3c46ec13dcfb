//! A small HTTP server for health and metrics.
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// More connections than this at a time wait: a scraper has one.
const CONNECTIONS: usize = 32;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// What a path is answered with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub content_type: &'static str,
    pub body: String,
}

/// # Errors
/// Where the address cannot be had; the error names the flag.
pub async fn bind(flag: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!(
            "{flag} {address}: cannot listen there (kube-proxy has the same port; `svc-agent check` says who has it)"
        )
    })
}

/// Answers GET and HEAD for the paths that `answer` knows.
pub async fn serve<F>(listener: TcpListener, answer: impl Fn(String) -> F + Send + Sync + 'static)
where
    F: Future<Output = Option<Answer>> + Send + 'static,
{
    let answer = Arc::new(answer);
    serve_all(listener, move |request| respond(request, Arc::clone(&answer))).await;
}

/// Answers every request by `respond`. When this is dropped, its connections are, too.
pub async fn serve_all<F>(listener: TcpListener, respond: impl Fn(Request<Incoming>) -> F + Send + Sync + 'static)
where
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let respond = Arc::new(respond);
    let mut connections = JoinSet::new();
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors: others must close some first.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        while connections.try_join_next().is_some() {}
        let respond = Arc::clone(&respond);
        connections.spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let response = respond(request);
                async move { Ok::<_, Infallible>(response.await) }
            });
            // A client that goes away, or sends no HTTP, is no concern of ours.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            drop(slot);
        });
    }
}

async fn respond<B, F>(request: Request<B>, answer: Arc<impl Fn(String) -> F>) -> Response<Full<Bytes>>
where
    F: Future<Output = Option<Answer>>,
{
    let plain =
        |status: StatusCode| Answer { status, content_type: "text/plain; charset=utf-8", body: format!("{status}\n") };
    let answer = if [Method::GET, Method::HEAD].contains(request.method()) {
        answer(request.uri().path().to_owned()).await.unwrap_or_else(|| plain(StatusCode::NOT_FOUND))
    } else {
        plain(StatusCode::METHOD_NOT_ALLOWED)
    };
    let mut response = Response::new(Full::from(answer.body));
    *response.status_mut() = answer.status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(answer.content_type));
    response.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
