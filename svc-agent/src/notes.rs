//! What the users of a Service should learn of it: Events on the Service, few and each once.
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, PostParams};
use tokio::sync::mpsc;
use tracing::{debug, warn};

use crate::object::ObjectName;

/// An Event's reason.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Reason {
    /// Another, older Service has the address and port.
    AddressConflict,
    /// An endpoint has an address that nothing can be sent to.
    EndpointRefused,
    /// The healthCheckNodePort is taken.
    HealthCheckFailed,
}

impl Reason {
    pub const ALL: [Reason; 3] = [Reason::AddressConflict, Reason::EndpointRefused, Reason::HealthCheckFailed];

    pub const fn label(self) -> &'static str {
        match self {
            Reason::AddressConflict => "ServiceAddressConflict",
            Reason::EndpointRefused => "EndpointAddressRefused",
            // Kube-proxy's.
            Reason::HealthCheckFailed => "FailedToStartServiceHealthcheck",
        }
    }

    /// What was tried.
    const fn action(self) -> &'static str {
        match self {
            Reason::AddressConflict | Reason::EndpointRefused => "Proxy",
            Reason::HealthCheckFailed => "Listen",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Note {
    pub service: ObjectName,
    /// The Service's.
    pub uid: Box<str>,
    pub reason: Reason,
    pub text: String,
}

/// Notes that wait to be written, beyond which they are lost: the log has them, too.
const WAITING: usize = 64;
/// An Event's note may not be longer (events.k8s.io/v1).
const LONGEST: usize = 1024;

/// Where notes go; by default nowhere, as without an API server.
#[derive(Clone, Debug, Default)]
pub struct Notes(Option<mpsc::Sender<Note>>);

impl Notes {
    pub fn channel() -> (Self, mpsc::Receiver<Note>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Notes(Some(sender)), receiver)
    }

    /// Never waits.
    pub fn send(&self, note: Note) {
        if let Some(sender) = &self.0
            && let Err(error) = sender.try_send(note)
        {
            debug!("a note is lost: {error}");
        }
    }
}

/// How many Events may be written: some at once, then one every so often.
#[derive(Debug)]
struct Limit {
    left: u32,
    since: Instant,
}

impl Limit {
    const BURST: u32 = 25;
    const EVERY: Duration = Duration::from_secs(10);

    fn new(now: Instant) -> Self {
        Limit { left: Self::BURST, since: now }
    }

    fn allows(&mut self, now: Instant) -> bool {
        let periods = now.saturating_duration_since(self.since).as_secs() / Self::EVERY.as_secs();
        self.left = (u64::from(self.left) + periods).min(u64::from(Self::BURST)) as u32;
        self.since += Self::EVERY * periods.min(u64::from(u32::MAX)) as u32;
        let allowed = self.left > 0;
        self.left -= u32::from(allowed);
        allowed
    }
}

/// Writes Events until nobody sends notes any more. What every node would say of a Service has the same name on each, so
/// that the first one writes it, and the others find it there.
pub async fn run(client: Client, node_name: &str, mut notes: mpsc::Receiver<Note>) {
    let mut limit = Limit::new(Instant::now());
    while let Some(note) = notes.recv().await {
        if !limit.allows(Instant::now()) {
            debug!(service = %note.service, "no Event, there are too many: {}", note.text);
            continue;
        }
        let service = note.service.clone();
        let events: Api<Event> = Api::namespaced(client.clone(), &service.namespace);
        match events.create(&PostParams::default(), &event(note, node_name, Timestamp::now())).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 409 => debug!(%service, "the Event is there already"),
            Err(error) => warn!(%service, "cannot write an Event: {error}"),
        }
    }
}

/// Its name is made of what it says.
fn event(note: Note, node_name: &str, now: Timestamp) -> Event {
    let Note { service, uid, reason, text } = note;
    let mut hasher = DefaultHasher::new();
    (&uid, reason.label(), &text).hash(&mut hasher);
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{}.{:016x}", service.name, hasher.finish())),
            namespace: Some(service.namespace.to_string()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        type_: Some("Warning".to_owned()),
        reason: Some(reason.label().to_owned()),
        action: Some(reason.action().to_owned()),
        note: Some(shortened(text)),
        reporting_controller: Some("svc-agent".to_owned()),
        reporting_instance: Some(node_name.to_owned()),
        regarding: Some(ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            namespace: Some(service.namespace.to_string()),
            name: Some(service.name.to_string()),
            uid: Some(uid.to_string()).filter(|uid| !uid.is_empty()),
            ..ObjectReference::default()
        }),
        ..Event::default()
    }
}

fn shortened(mut text: String) -> String {
    if text.len() > LONGEST {
        let end = (0..=LONGEST - 3).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push_str("...");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_notes_becomes_a_trickle_of_events() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        assert_eq!((0..1000).filter(|_| limit.allows(start)).count(), 25);
        let later = |seconds| start + Duration::from_secs(seconds);
        assert!(!limit.allows(later(9)));
        assert!(limit.allows(later(10)));
        assert!(!limit.allows(later(19)));
        assert_eq!((0..1000).filter(|_| limit.allows(later(100_000))).count(), 25);
    }

    #[test]
    fn a_long_note_is_cut_between_characters() {
        let text = shortened("ä".repeat(1000));
        assert!(text.len() <= LONGEST && text.ends_with("ä..."), "{text}");
        assert_eq!(shortened("short".to_owned()), "short");
    }

    fn note(uid: &str, text: &str) -> Note {
        let service = ObjectName::new("a", "b");
        Note { service, uid: uid.into(), reason: Reason::AddressConflict, text: text.to_owned() }
    }

    #[test]
    fn the_same_thing_said_by_two_nodes_has_one_name_and_another_thing_another() {
        let now = Timestamp::now();
        let name = |node, uid, text| event(note(uid, text), node, now).metadata.name.unwrap();
        assert_eq!(name("x", "u1", "text"), name("y", "u1", "text"));
        assert_ne!(name("x", "u1", "text"), name("x", "u2", "text"));
        assert_ne!(name("x", "u1", "text"), name("x", "u1", "other text"));
        let regarding = event(note("u1", "text"), "x", now).regarding.unwrap();
        assert_eq!((regarding.uid.as_deref(), regarding.name.as_deref()), (Some("u1"), Some("b")));
    }

    #[test]
    fn a_note_that_finds_no_room_waits_for_nothing() {
        let (notes, mut inbox) = Notes::channel();
        let note = note("u1", "");
        for _ in 0..2 * WAITING {
            notes.send(note.clone());
        }
        let received = std::iter::from_fn(|| inbox.try_recv().ok()).count();
        assert_eq!(received, WAITING);
    }
}
