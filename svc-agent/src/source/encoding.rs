//! How the API server writes its answers: lists, watches and errors, as protobuf or as JSON.
//!
//! A list is read as it arrives, object by object, so that no more of it than an object is held. (As JSON, which is only for
//! a server that has no protobuf, the text is held as a whole.)
use std::borrow::Cow;

use bytes::{Buf as _, Bytes, BytesMut};
use hyper::header::CONTENT_TYPE;
use hyper::{HeaderMap, StatusCode};
use prost::{DecodeError, Message};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::wire::{ListMeta, Object, Status};

/// What we take, the best first, as client-go says it.
pub const ACCEPT: &str = "application/vnd.kubernetes.protobuf, application/json";
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

/// Before a message that says of what kind it is (runtime.Unknown of k8s.io/apimachinery).
const MAGIC: &[u8] = b"k8s\0";
/// Far beyond what etcd lets an object have.
const OBJECT_BYTES: u64 = 64 << 20;
const TOO_LONG: &str = "an object is too long";
const NO_MAGIC: &str = "it does not begin with k8s";

/// An answer is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    #[error(transparent)]
    Protobuf(#[from] DecodeError),
    #[error("failed to decode JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the API server's answer is malformed: {0}")]
    Otherwise(&'static str),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encoding {
    Protobuf,
    Json,
}

impl Encoding {
    /// That of an answer with these headers.
    pub fn of(headers: &HeaderMap) -> Self {
        let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if kind.split(';').next().is_some_and(|kind| kind.trim() == PROTOBUF) {
            Encoding::Protobuf
        } else {
            Encoding::Json
        }
    }

    /// A message that stands alone.
    fn message<T: Message + Default + DeserializeOwned>(self, bytes: &[u8]) -> Result<T, Malformed> {
        match self {
            Encoding::Protobuf => {
                let unknown = bytes.strip_prefix(MAGIC).ok_or(Malformed::Otherwise(NO_MAGIC))?;
                Ok(T::decode(Unknown::decode(unknown)?.raw)?)
            }
            Encoding::Json => Ok(serde_json::from_slice(bytes)?),
        }
    }

    /// Of an answer that is an error; a proxy's may be any text.
    pub fn status(self, code: StatusCode, body: &[u8]) -> Status {
        self.message(body).ok().filter(|status: &Status| status.code.is_some()).unwrap_or_else(|| Status {
            message: Some(String::from_utf8_lossy(body).trim().to_owned()),
            reason: None,
            code: Some(code.as_u16().into()),
        })
    }

    /// What a frame of a watch says.
    pub fn event<T: Object>(self, frame: &[u8]) -> Result<Event<T>, Malformed> {
        match self {
            Encoding::Protobuf => {
                let event = WatchEvent::decode(frame)?;
                self.typed(&event.kind, &event.object.unwrap_or_default().raw)
            }
            Encoding::Json => {
                let event: JsonWatchEvent = serde_json::from_slice(frame)?;
                self.typed(&event.kind, event.object.get().as_bytes())
            }
        }
    }

    fn typed<T: Object>(self, kind: &str, object: &[u8]) -> Result<Event<T>, Malformed> {
        Ok(match kind {
            "ADDED" | "MODIFIED" => Event::Put(self.message(object)?),
            "DELETED" => Event::Delete(self.message(object)?),
            "BOOKMARK" => Event::Bookmark(self.message(object)?),
            "ERROR" => Event::Error(self.message(object)?),
            _ => return Err(Malformed::Otherwise("an event of a watch is of an unknown type")),
        })
    }
}

/// An event of a watch.
#[derive(Clone, PartialEq, Debug)]
pub enum Event<T> {
    Put(T),
    Delete(T),
    /// Of the object only the resourceVersion counts.
    Bookmark(T),
    Error(Status),
}

#[derive(Clone, PartialEq, Message)]
struct Unknown {
    #[prost(bytes = "bytes", tag = "2")]
    raw: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct WatchEvent {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(message, optional, tag = "2")]
    object: Option<RawExtension>,
}

#[derive(Clone, PartialEq, Message)]
struct RawExtension {
    #[prost(bytes = "bytes", tag = "1")]
    raw: Bytes,
}

#[derive(Deserialize)]
struct JsonWatchEvent<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct JsonList<'a> {
    #[serde(default)]
    metadata: ListMeta,
    /// Null where there are none.
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

/// Reads a list piece by piece. An object that cannot be read costs no other: each is given by itself.
#[derive(Debug)]
pub struct ListReader {
    encoding: Encoding,
    /// What is not read yet.
    buffer: BytesMut,
    at: At,
    version: Option<String>,
}

/// Where in a protobuf list we are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    Magic,
    /// Before the list.
    Head,
    /// In the list, of which there are so many bytes still to come.
    List(u64),
    /// Behind the list.
    Tail,
}

/// Fields of runtime.Unknown, and of every list.
const RAW: u64 = 2;
const METADATA: u64 = 1;
const ITEMS: u64 = 2;

impl ListReader {
    pub fn new(encoding: Encoding) -> Self {
        ListReader { encoding, buffer: BytesMut::new(), at: At::Magic, version: None }
    }

    /// Takes the body's next piece, and gives each object that is whole with it.
    pub fn read<T: Object>(
        &mut self,
        piece: &[u8],
        mut give: impl FnMut(Result<T, Malformed>),
    ) -> Result<(), Malformed> {
        self.buffer.extend_from_slice(piece);
        while self.encoding == Encoding::Protobuf && self.step(&mut give)? {}
        Ok(())
    }

    /// After the body's last piece: gives what is left, and returns the list's resourceVersion.
    pub fn end<T: Object>(self, mut give: impl FnMut(Result<T, Malformed>)) -> Result<Option<String>, Malformed> {
        match self.encoding {
            Encoding::Protobuf if self.at == At::Tail && self.buffer.is_empty() => Ok(self.version),
            Encoding::Protobuf => Err(Malformed::Otherwise("the list ends too early")),
            Encoding::Json => {
                let list: JsonList = serde_json::from_slice(&self.buffer)?;
                for item in list.items.into_iter().flatten() {
                    give(serde_json::from_str(item.get()).map_err(Malformed::from));
                }
                Ok(list.metadata.resource_version)
            }
        }
    }

    /// Reads on by one field; false where it is not whole yet.
    fn step<T: Object>(&mut self, give: &mut impl FnMut(Result<T, Malformed>)) -> Result<bool, Malformed> {
        if self.at == At::Magic {
            if self.buffer.len() < MAGIC.len() {
                return Ok(false);
            }
            if !self.buffer.starts_with(MAGIC) {
                return Err(Malformed::Otherwise(NO_MAGIC));
            }
            self.buffer.advance(MAGIC.len());
            self.at = At::Head;
        }
        let Some(field) = Field::at(&self.buffer)? else { return Ok(false) };
        if self.at == At::Head && field.number == RAW && field.is_bytes {
            self.buffer.advance(field.head);
            self.at = At::List(field.len).or_tail();
            return Ok(true);
        }
        if field.len > OBJECT_BYTES {
            return Err(Malformed::Otherwise(TOO_LONG));
        }
        let whole = field.head + field.len as usize;
        if let At::List(left) = self.at
            && whole as u64 > left
        {
            return Err(Malformed::Otherwise("an object is longer than its list"));
        }
        if self.buffer.len() < whole {
            return Ok(false);
        }
        if let At::List(left) = self.at {
            let value = &self.buffer[field.head..whole];
            match field.number {
                METADATA if field.is_bytes => {
                    self.version = ListMeta::decode(value)?.resource_version;
                }
                ITEMS if field.is_bytes => give(T::decode(value).map_err(Malformed::from)),
                _ => {}
            }
            self.at = At::List(left - whole as u64).or_tail();
        }
        self.buffer.advance(whole);
        Ok(true)
    }
}

impl At {
    fn or_tail(self) -> Self {
        if self == At::List(0) { At::Tail } else { self }
    }
}

/// A protobuf field: how long its tag and length are, and its value.
struct Field {
    number: u64,
    is_bytes: bool,
    head: usize,
    len: u64,
}

impl Field {
    /// None where the bytes end before its value begins.
    fn at(bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let Some((tag, head)) = varint(bytes)? else { return Ok(None) };
        let (number, kind) = (tag >> 3, tag & 7);
        let field = |head, len| Some(Field { number, is_bytes: kind == 2, head, len });
        Ok(match kind {
            0 => varint(&bytes[head..])?.and_then(|(_, len)| field(head, len as u64)),
            1 => field(head, 8),
            2 => varint(&bytes[head..])?.and_then(|(len, more)| field(head + more, len)),
            5 => field(head, 4),
            _ => return Err(Malformed::Otherwise("a field is of an unknown wire type")),
        })
    }
}

/// A varint and its length; none where the bytes end before it does.
fn varint(bytes: &[u8]) -> Result<Option<(u64, usize)>, Malformed> {
    let mut value = 0;
    for (index, byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok(Some((value, index + 1)));
        }
    }
    if bytes.len() < 10 { Ok(None) } else { Err(Malformed::Otherwise("a number has no end")) }
}

/// Cuts the body of a watch into the frames that an event each has.
#[derive(Debug)]
pub struct Frames {
    encoding: Encoding,
    buffer: BytesMut,
}

impl Frames {
    pub fn new(encoding: Encoding) -> Self {
        Frames { encoding, buffer: BytesMut::new() }
    }

    pub fn push(&mut self, piece: &[u8]) {
        self.buffer.extend_from_slice(piece);
    }

    /// The next one; none where it is not whole yet.
    ///
    /// # Errors
    /// Where nothing that follows can be read, either.
    pub fn next_frame(&mut self) -> Result<Option<Bytes>, Malformed> {
        match self.encoding {
            Encoding::Protobuf => {
                let Some(head) = self.buffer.first_chunk::<4>() else { return Ok(None) };
                let len = u32::from_be_bytes(*head);
                if u64::from(len) > OBJECT_BYTES {
                    return Err(Malformed::Otherwise(TOO_LONG));
                }
                if self.buffer.len() < 4 + len as usize {
                    return Ok(None);
                }
                self.buffer.advance(4);
                Ok(Some(self.buffer.split_to(len as usize).freeze()))
            }
            Encoding::Json => {
                if self.buffer.len() as u64 > OBJECT_BYTES {
                    return Err(Malformed::Otherwise(TOO_LONG));
                }
                while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                    let line = self.buffer.split_to(end + 1);
                    if !line.trim_ascii().is_empty() {
                        return Ok(Some(line.freeze()));
                    }
                }
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
pub(in crate::source) mod tests {
    use proptest::prelude::*;
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::source::wire::{ObjectMeta, Service, ServiceSpec};

    #[derive(Clone, PartialEq, Message)]
    struct List {
        #[prost(message, optional, tag = "1")]
        metadata: Option<ListMeta>,
        #[prost(message, repeated, tag = "2")]
        items: Vec<Service>,
    }

    fn service(name: &str, version: &str) -> Service {
        let text = |text: &str| Some(text.to_owned());
        let metadata = ObjectMeta { name: text(name), resource_version: text(version), ..ObjectMeta::default() };
        let spec = ServiceSpec { cluster_ip: text("10.96.0.1"), ..ServiceSpec::default() };
        Service { metadata: Some(metadata), spec: Some(spec), status: None }
    }

    fn services() -> Vec<Service> {
        (0..5).map(|number| service(&"x".repeat(number * 50), "3")).collect()
    }

    fn json_of(service: &Service) -> serde_json::Value {
        let (meta, spec) = (service.metadata.as_ref().unwrap(), service.spec.as_ref().unwrap());
        json!({
            "metadata": { "name": meta.name, "resourceVersion": meta.resource_version, "managedFields": [{}] },
            "spec": { "clusterIP": spec.cluster_ip, "ports": null },
        })
    }

    /// As the API server has it: what kind it is, the message, and how that is encoded.
    fn enveloped(message: &impl Message) -> Vec<u8> {
        let kind = [0x0a, 0x07, 0x0a, 0x02, b'v', b'1', 0x12, 0x01, b'X'];
        let how = [0x1a, 0x00, 0x22, 0x00];
        [MAGIC, &kind, &Unknown { raw: message.encode_to_vec().into() }.encode_to_vec(), &how].concat()
    }

    /// A list's body.
    pub(in crate::source) fn list(encoding: Encoding, version: &str, items: &[Service]) -> Vec<u8> {
        let version = Some(version.to_owned()).filter(|version| !version.is_empty());
        match encoding {
            Encoding::Protobuf => {
                enveloped(&List { metadata: Some(ListMeta { resource_version: version }), items: items.to_vec() })
            }
            Encoding::Json => {
                let items: Vec<_> = items.iter().map(json_of).collect();
                json!({ "metadata": { "resourceVersion": version }, "items": items }).to_string().into()
            }
        }
    }

    fn framed(encoding: Encoding, event: &[u8]) -> Vec<u8> {
        match encoding {
            Encoding::Protobuf => [&u32::try_from(event.len()).unwrap().to_be_bytes(), event].concat(),
            Encoding::Json => [event, b"\n"].concat(),
        }
    }

    /// An event's frame in a watch's body.
    pub(in crate::source) fn event(encoding: Encoding, kind: &str, name: &str, version: &str) -> Vec<u8> {
        let object = service(name, version);
        let event = match encoding {
            Encoding::Protobuf => {
                let object = Some(RawExtension { raw: enveloped(&object).into() });
                WatchEvent { kind: kind.to_owned(), object }.encode_to_vec()
            }
            Encoding::Json => json!({ "type": kind, "object": json_of(&object) }).to_string().into(),
        };
        framed(encoding, &event)
    }

    /// The frame of an error in a watch's body.
    pub(in crate::source) fn error_event(encoding: Encoding, code: i32) -> Vec<u8> {
        let event = match encoding {
            Encoding::Protobuf => {
                let status = Status { code: Some(code), ..Status::default() };
                let object = Some(RawExtension { raw: enveloped(&status).into() });
                WatchEvent { kind: "ERROR".to_owned(), object }.encode_to_vec()
            }
            Encoding::Json => json!({ "type": "ERROR", "object": { "code": code } }).to_string().into(),
        };
        framed(encoding, &event)
    }

    type Read = Result<(Vec<Result<Service, Malformed>>, Option<String>), Malformed>;

    fn read<'a>(encoding: Encoding, pieces: impl IntoIterator<Item = &'a [u8]>) -> Read {
        let mut reader = ListReader::new(encoding);
        let mut found = Vec::new();
        for piece in pieces {
            reader.read(piece, |item| found.push(item))?;
        }
        let version = reader.end(|item| found.push(item))?;
        Ok((found, version))
    }

    const BOTH: [Encoding; 2] = [Encoding::Protobuf, Encoding::Json];

    #[test]
    fn a_list_says_the_same_in_pieces_of_any_size() {
        for encoding in BOTH {
            let body = list(encoding, "7", &services());
            for size in 1..=body.len() {
                let (found, version) = read(encoding, body.chunks(size)).unwrap();
                let found: Vec<_> = found.into_iter().map(Result::unwrap).collect();
                assert_eq!((found, version.as_deref()), (services(), Some("7")), "{encoding:?}, pieces of {size}");
            }
        }
    }

    #[test]
    fn a_list_with_nothing_in_it_is_one() {
        for encoding in BOTH {
            let body = list(encoding, "7", &[]);
            let (found, version) = read(encoding, [&body[..]]).unwrap();
            assert_eq!((found.len(), version.as_deref()), (0, Some("7")));
        }
        let body = br#"{"metadata": {"resourceVersion": "7"}, "items": null}"#;
        assert!(read(Encoding::Json, [&body[..]]).unwrap().0.is_empty());
    }

    #[test]
    fn a_list_that_is_cut_short_is_none() {
        for encoding in BOTH {
            let body = list(encoding, "7", &services());
            // What comes behind a protobuf list may be missing.
            let behind = if encoding == Encoding::Protobuf { 4 } else { 0 };
            for end in 0..body.len() - behind {
                assert!(read(encoding, [&body[..end]]).is_err(), "{encoding:?}, {end} of {} bytes", body.len());
            }
        }
    }

    #[test]
    fn an_object_that_cannot_be_read_costs_no_other() {
        for encoding in BOTH {
            let mut body = list(encoding, "7", &[service("one", "1"), service("odd", "2"), service("two", "3")]);
            let place = body.windows(3).position(|bytes| bytes == b"odd").unwrap();
            body[place] = 0xff;
            let Ok((found, _)) = read(encoding, [&body[..]]) else {
                assert_eq!(encoding, Encoding::Json, "a JSON text is UTF-8 or nothing");
                continue;
            };
            let readable: Vec<_> = found.into_iter().flatten().collect();
            assert_eq!(readable, [service("one", "1"), service("two", "3")]);
        }
        let body =
            br#"{"metadata": {}, "items": [{"spec": 5}, {"metadata": {"name": "a"}}, {"spec": {"ports": [0]}}]}"#;
        let (found, _) = read(Encoding::Json, [&body[..]]).unwrap();
        assert_eq!(found.iter().map(Result::is_ok).collect::<Vec<_>>(), [false, true, false]);
    }

    #[test]
    fn a_watch_says_the_same_in_pieces_of_any_size() {
        for encoding in BOTH {
            let body = [
                event(encoding, "ADDED", "a", "1"),
                event(encoding, "MODIFIED", "b", "2"),
                event(encoding, "DELETED", "c", "3"),
                event(encoding, "BOOKMARK", "", "4"),
                error_event(encoding, 410),
            ]
            .concat();
            let expected = [
                Event::Put(service("a", "1")),
                Event::Put(service("b", "2")),
                Event::Delete(service("c", "3")),
                Event::Bookmark(service("", "4")),
                Event::Error(Status { code: Some(410), ..Status::default() }),
            ];
            for size in 1..=body.len() {
                let mut frames = Frames::new(encoding);
                let mut events = Vec::new();
                for piece in body.chunks(size) {
                    frames.push(piece);
                    while let Some(frame) = frames.next_frame().unwrap() {
                        events.push(encoding.event(&frame).unwrap());
                    }
                }
                assert_eq!(events, expected, "{encoding:?}, pieces of {size}");
            }
        }
    }

    #[rstest]
    #[case::protobuf("application/vnd.kubernetes.protobuf", Encoding::Protobuf)]
    #[case::protobuf_of_a_watch("application/vnd.kubernetes.protobuf;stream=watch", Encoding::Protobuf)]
    #[case::json("application/json", Encoding::Json)]
    #[case::nothing("", Encoding::Json)]
    fn the_answers_type_says_how_it_is_encoded(#[case] kind: &str, #[case] expected: Encoding) {
        let headers = [(CONTENT_TYPE, kind.parse().unwrap())].into_iter().collect();
        assert_eq!(Encoding::of(&headers), expected);
    }

    #[test]
    fn an_error_is_told_however_it_is_written() {
        let gone = Status {
            code: Some(410),
            reason: Some("Expired".to_owned()),
            message: Some("too old resource version: 1 (5)".to_owned()),
        };
        let json = br#"{"kind":"Status","code":410,"reason":"Expired","message":"too old resource version: 1 (5)"}"#;
        assert_eq!(Encoding::Protobuf.status(StatusCode::GONE, &enveloped(&gone)), gone);
        assert_eq!(Encoding::Json.status(StatusCode::GONE, json), gone);
        let text = Encoding::Json.status(StatusCode::BAD_GATEWAY, b"<html>\n");
        assert_eq!((text.code, text.message.as_deref()), (Some(502), Some("<html>")));
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_an_error_or_nothing(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            is_begun in any::<bool>(),
        ) {
            let begin: &[u8] = if is_begun { b"k8s\0\x12\x7f" } else { b"" };
            let body = [begin, &bytes].concat();
            for encoding in BOTH {
                let _ = read(encoding, [&body[..]]);
                let _ = encoding.event::<Service>(&body);
                let mut frames = Frames::new(encoding);
                frames.push(&body);
                while let Ok(Some(frame)) = frames.next_frame() {
                    let _ = encoding.event::<Service>(&frame);
                }
            }
        }

        #[test]
        fn a_list_with_a_wrong_byte_is_read_or_not(place in any::<prop::sample::Index>(), byte in any::<u8>()) {
            for encoding in BOTH {
                let mut body = list(encoding, "7", &services());
                let place = place.index(body.len());
                body[place] = byte;
                if let Ok((found, _)) = read(encoding, [&body[..]]) {
                    prop_assert!(found.len() <= body.len());
                }
            }
        }
    }
}
