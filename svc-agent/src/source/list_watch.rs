//! Objects of one kind, of the Kubernetes API: a list of them, and then their changes.
//!
//! A list is asked for as a whole and without a resourceVersion, which is to say: the newest. Since Kubernetes 1.31 the server
//! has that in memory, and asks etcd only whether it is. One that may be older (resourceVersion 0) would undo at a restart what
//! an earlier run has seen already.
use std::io::{self, ErrorKind};
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::body::Bytes;
use hyper::header::{ACCEPT, HeaderValue};
use hyper::{Request, StatusCode};
use kube::api::{ListParams, WatchParams};
use kube::client::Body;
use kube::{Client, Resource};
use tokio::time::timeout;
use tracing::warn;

use super::decode::object_name;
use super::encoding::{self, Encoding, Event, Frames, ListReader, Malformed};
use super::wire::{Object, Status};
use crate::object::ObjectName;

/// The server ends a watch after this time, which makes room for a new one elsewhere.
const WATCH_SECONDS: u32 = 290;
/// A watch that has said nothing for so long, not even that it ends, is dead.
const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 5);

/// Why there is neither a list nor a change.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server says so.
    #[error("the API server answers: {0}")]
    Refused(Status),
    #[error(transparent)]
    Client(#[from] kube::Error),
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("the API server's answer has no metadata.resourceVersion")]
    NoVersion,
}

impl Error {
    /// The HTTP status that the server answered with.
    pub fn code(&self) -> Option<u16> {
        match self {
            Error::Refused(status) => status.code.and_then(|code| u16::try_from(code).ok()),
            _ => None,
        }
    }

    /// The server no longer knows what came after our version.
    pub fn is_gone(&self) -> bool {
        self.code() == Some(StatusCode::GONE.as_u16())
    }
}

/// What becomes of what is known.
#[derive(Debug)]
pub enum Change<I> {
    /// These are all there are.
    List(Vec<I>),
    Put(I),
    Delete(ObjectName),
}

/// Lists and then watches objects `T`, of which `I` is kept.
pub struct ListWatch<T, I> {
    requests: Requests,
    keep: fn(&T) -> Option<I>,
    state: State,
}

enum State {
    Unlisted,
    /// All up to this version is known.
    Listed(String),
    Watching(String, Watch),
}

impl<T: Object, I> ListWatch<T, I> {
    /// `K` is what the API has them as; `keep` says what is kept of an object: none where it is not for us.
    pub fn new<K: Resource<DynamicType = ()>>(client: Client, selector: Selector, keep: fn(&T) -> Option<I>) -> Self {
        ListWatch { requests: Requests::new::<K>(client, selector), keep, state: State::Unlisted }
    }

    /// The first list, and then each change. After an error the next call goes on from the version that was last seen, and
    /// with a list only where the server no longer knows that.
    ///
    /// # Errors
    /// Where the server cannot be reached, refuses, or answers what cannot be read.
    pub async fn next(&mut self) -> Result<Change<I>, Error> {
        loop {
            match &mut self.state {
                State::Unlisted => {
                    let (items, version) = self.requests.list(self.keep).await?;
                    self.state = State::Listed(version);
                    return Ok(Change::List(items));
                }
                State::Listed(version) => match self.requests.watch(version).await {
                    Ok(watch) => self.state = State::Watching(std::mem::take(version), watch),
                    Err(error) => return Err(self.failed(error)),
                },
                State::Watching(version, watch) => match timeout(SILENCE, watch.frame()).await {
                    Ok(Ok(Some(frame))) => {
                        let event = watch.encoding.event(&frame)?;
                        if let Some(change) = self.take(event)? {
                            return Ok(change);
                        }
                    }
                    end => {
                        self.state = State::Listed(std::mem::take(version));
                        end.unwrap_or(Ok(None))?;
                    }
                },
            }
        }
    }

    /// Of a watch; none where nothing changes.
    fn take(&mut self, event: Event<T>) -> Result<Option<Change<I>>, Error> {
        let (object, change) = match event {
            Event::Put(object) => match (self.keep)(&object) {
                Some(item) => (object, Some(Change::Put(item))),
                None => deleted(object),
            },
            Event::Delete(object) => deleted(object),
            Event::Bookmark(object) => (object, None),
            Event::Error(status) => return Err(self.failed(Error::Refused(status))),
        };
        let seen = object.metadata().and_then(|meta| meta.resource_version.clone()).filter(|seen| !seen.is_empty());
        match (seen, &mut self.state) {
            (Some(seen), State::Watching(version, _)) => {
                *version = seen;
                Ok(change)
            }
            _ => {
                self.state = State::Unlisted;
                Err(Error::NoVersion)
            }
        }
    }

    fn failed(&mut self, error: Error) -> Error {
        if error.is_gone() {
            self.state = State::Unlisted;
        }
        error
    }
}

fn deleted<T: Object, I>(object: T) -> (T, Option<Change<I>>) {
    let name = object_name(object.metadata());
    (object, Some(Change::Delete(name)))
}

/// Which objects of a kind: those that match both, where they are given.
#[derive(Clone, Debug, Default)]
pub struct Selector {
    pub labels: Option<String>,
    pub fields: Option<String>,
}

struct Requests {
    client: Client,
    request: kube::core::Request,
    list: ListParams,
    watch: WatchParams,
}

impl Requests {
    fn new<K: Resource<DynamicType = ()>>(client: Client, selector: Selector) -> Self {
        let Selector { labels, fields } = selector;
        Requests {
            client,
            request: kube::core::Request::new(K::url_path(&(), None)),
            list: ListParams {
                label_selector: labels.clone(),
                field_selector: fields.clone(),
                ..ListParams::default()
            },
            watch: WatchParams {
                label_selector: labels.clone(),
                field_selector: fields.clone(),
                timeout: Some(WATCH_SECONDS),
                ..WatchParams::default()
            },
        }
    }

    /// What is kept of all objects, and their version.
    async fn list<T: Object, I>(&self, keep: fn(&T) -> Option<I>) -> Result<(Vec<I>, String), Error> {
        let (encoding, mut body) = self.ask(self.request.list(&self.list)).await?;
        let mut reader = ListReader::new(encoding);
        let mut items = Vec::new();
        let mut give = |object: Result<T, Malformed>| match object {
            Ok(object) => items.extend(keep(&object)),
            Err(error) => warn!(path = self.request.url_path, "an object is left out of the list: {error}"),
        };
        while let Some(piece) = piece(&mut body).await? {
            reader.read(&piece, &mut give)?;
        }
        let version = reader.end(&mut give)?.filter(|version| !version.is_empty()).ok_or(Error::NoVersion)?;
        Ok((items, version))
    }

    async fn watch(&self, version: &str) -> Result<Watch, Error> {
        let (encoding, body) = self.ask(self.request.watch(&self.watch, version)).await?;
        Ok(Watch { encoding, frames: Frames::new(encoding), body })
    }

    /// The answer's body, and how it is encoded.
    async fn ask(
        &self,
        request: Result<Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<(Encoding, Body), Error> {
        let mut request = request.map_err(kube::Error::BuildRequest)?.map(Body::from);
        request.headers_mut().insert(ACCEPT, HeaderValue::from_static(encoding::ACCEPT));
        let response = self.client.send(request).await?;
        let encoding = Encoding::of(response.headers());
        let code = response.status();
        let mut body = response.into_body();
        if code.is_success() {
            return Ok((encoding, body));
        }
        let mut text = Vec::new();
        while let Some(piece) = piece(&mut body).await? {
            text.extend_from_slice(&piece);
        }
        Err(Error::Refused(encoding.status(code, &text)))
    }
}

struct Watch {
    encoding: Encoding,
    frames: Frames,
    body: Body,
}

impl Watch {
    /// None at its end. That the connection has broken, or was silent for too long, is an end like any other: what comes of
    /// it is seen when the next watch starts.
    async fn frame(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if let Some(frame) = self.frames.next_frame()? {
                return Ok(Some(frame));
            }
            match piece(&mut self.body).await {
                Ok(Some(piece)) => self.frames.push(&piece),
                Ok(None) => return Ok(None),
                Err(error) if is_end(&error) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

async fn piece(body: &mut Body) -> kube::Result<Option<Bytes>> {
    while let Some(frame) = body.frame().await {
        // Or the trailers, which nobody sends.
        if let Ok(piece) = frame?.into_data() {
            return Ok(Some(piece));
        }
    }
    Ok(None)
}

fn is_end(error: &kube::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::TimedOut)
        {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use hyper::Response;
    use hyper::header::CONTENT_TYPE;
    use k8s_openapi::api::core::v1 as core;
    use tower::service_fn;

    use super::super::decode;
    use super::super::encoding::tests::{error_event, event, list};
    use super::super::wire::Service;
    use super::*;

    const BOTH: [Encoding; 2] = [Encoding::Protobuf, Encoding::Json];

    /// A server that answers with these, one after the other, and the queries that it has had.
    struct Server {
        client: Client,
        queries: Arc<Mutex<Vec<String>>>,
    }

    impl Server {
        fn answering(encoding: Encoding, answers: Vec<(u16, Vec<u8>)>) -> Self {
            let queries = Arc::<Mutex<Vec<String>>>::default();
            let (asked, answers) = (Arc::clone(&queries), Arc::new(Mutex::new(answers.into_iter())));
            let service = service_fn(move |request: Request<Body>| {
                assert_eq!(request.headers()[ACCEPT], encoding::ACCEPT);
                let mut query: Vec<_> = request.uri().query().unwrap_or_default().split('&').collect();
                query.retain(|word| ["label", "limit", "resource"].iter().any(|name| word.starts_with(name)));
                asked.lock().unwrap().push(query.join("&"));
                let (code, body) = answers.lock().unwrap().next().expect("more questions than answers");
                let kind = match encoding {
                    Encoding::Protobuf => "application/vnd.kubernetes.protobuf",
                    Encoding::Json => "application/json",
                };
                let response = Response::builder().status(code).header(CONTENT_TYPE, kind).body(Body::from(body));
                async move { response }
            });
            Server { client: Client::new(service, "default"), queries }
        }

        fn queries(&self) -> Vec<String> {
            self.queries.lock().unwrap().clone()
        }
    }

    fn services(server: &Server) -> ListWatch<Service, String> {
        let selector = Selector { labels: Some("!a".to_owned()), ..Selector::default() };
        let keep =
            |object: &Service| Some(decode::service(object).name.to_string()).filter(|name| name != "default/no");
        ListWatch::new::<core::Service>(server.client.clone(), selector, keep)
    }

    /// In a word or two.
    async fn next(changes: &mut ListWatch<Service, String>) -> String {
        match changes.next().await {
            Ok(Change::List(items)) => format!("list of {}", items.len()),
            Ok(Change::Put(item)) => format!("put {item}"),
            Ok(Change::Delete(name)) => format!("delete {name}"),
            Err(error) => format!("error {:?}", error.code()),
        }
    }

    #[tokio::test]
    async fn a_watch_goes_on_from_what_it_has_seen_last() {
        for encoding in BOTH {
            let server = Server::answering(
                encoding,
                vec![
                    (200, list(encoding, "5", &[])),
                    (200, [event(encoding, "ADDED", "a", "6"), event(encoding, "DELETED", "b", "7")].concat()),
                    (200, event(encoding, "BOOKMARK", "", "9")),
                    (503, b"away".to_vec()),
                    (200, event(encoding, "MODIFIED", "no", "12")),
                    (200, error_event(encoding, 500)),
                ],
            );
            let mut changes = services(&server);
            for expected in [
                "list of 0",
                "put default/a",
                "delete default/b",
                "error Some(503)",
                "delete default/no",
                "error Some(500)",
            ] {
                assert_eq!(next(&mut changes).await, expected);
            }
            let labels = "labelSelector=%21a";
            let watch = |version: u32| format!("{labels}&resourceVersion={version}");
            assert_eq!(server.queries(), [labels.to_owned(), watch(5), watch(7), watch(9), watch(9), watch(12)]);
        }
    }

    #[tokio::test]
    async fn only_a_version_that_the_server_has_forgotten_costs_a_list() {
        for encoding in BOTH {
            let server = Server::answering(
                encoding,
                vec![
                    (200, list(encoding, "5", &[])),
                    (200, error_event(encoding, 410)),
                    (200, list(encoding, "8", &[])),
                    (410, b"gone".to_vec()),
                    (500, b"not now".to_vec()),
                    (200, list(encoding, "", &[])),
                    (200, list(encoding, "9", &[])),
                    (200, event(encoding, "ADDED", "a", "")),
                    (200, list(encoding, "11", &[])),
                ],
            );
            let mut changes = services(&server);
            for expected in [
                "list of 0",
                "error Some(410)",
                "list of 0",
                "error Some(410)",
                "error Some(500)",
                "error None",
                "list of 0",
                "error None",
                "list of 0",
            ] {
                assert_eq!(next(&mut changes).await, expected);
            }
        }
    }

    #[tokio::test]
    async fn an_event_that_cannot_be_read_costs_no_other() {
        for encoding in BOTH {
            let odd = event(encoding, "ODD", "a", "6");
            let server = Server::answering(
                encoding,
                vec![(200, list(encoding, "5", &[])), (200, [odd, event(encoding, "ADDED", "b", "7")].concat())],
            );
            let mut changes = services(&server);
            for expected in ["list of 0", "error None", "put default/b"] {
                assert_eq!(next(&mut changes).await, expected);
            }
        }
    }
}
