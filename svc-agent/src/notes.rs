//! What the users of a Service should learn of it: Events on the Service, few and each once.
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
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

/// Writes Events until nobody sends notes any more. The same thing said again counts up the Event that is there.
pub async fn run(client: Client, node_name: &str, mut notes: mpsc::Receiver<Note>) {
    let reporter = Reporter { controller: "svc-agent".to_owned(), instance: Some(node_name.to_owned()) };
    let recorder = Recorder::new(client, reporter);
    let mut limit = Limit::new(Instant::now());
    while let Some(note) = notes.recv().await {
        if !limit.allows(Instant::now()) {
            debug!(service = %note.service, "no Event, there are too many: {}", note.text);
            continue;
        }
        let Note { service, reason, text } = note;
        let event = Event {
            type_: EventType::Warning,
            reason: reason.label().to_owned(),
            note: Some(shortened(text)),
            action: reason.action().to_owned(),
            secondary: None,
        };
        let regarding = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            namespace: Some(service.namespace.to_string()),
            name: Some(service.name.to_string()),
            ..ObjectReference::default()
        };
        if let Err(error) = recorder.publish(&event, &regarding).await {
            warn!(%service, "cannot write an Event: {error}");
        }
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

    #[test]
    fn a_note_that_finds_no_room_waits_for_nothing() {
        let (notes, mut inbox) = Notes::channel();
        let note = Note { service: ObjectName::new("a", "b"), reason: Reason::AddressConflict, text: String::new() };
        for _ in 0..2 * WAITING {
            notes.send(note.clone());
        }
        let received = std::iter::from_fn(|| inbox.try_recv().ok()).count();
        assert_eq!(received, WAITING);
    }
}
