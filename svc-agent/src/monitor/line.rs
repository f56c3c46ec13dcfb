//! An event in words: the names of what it is about.
use std::collections::HashMap;
use std::time::SystemTime;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use svc_common::map::{
    EVENT_FROM_HOST, EVENT_FROM_NETWORK, EVENT_FROM_POD, EVENT_FROM_SOCKET, Event, FrontendKey, NO_BACKEND,
};
use svc_common::{Addr, Kind, Reason};

use crate::dataplane::State;
use crate::dataplane::dump::address_and_port;
use crate::host;
use crate::inspect::frontend_at;
use crate::object::Protocol;
use crate::plan::PortName;

/// One event. The fields' names are stable.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// RFC 3339, UTC.
    pub time: String,
    /// `drop`, `reject` or `new-flow`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub reason: &'static str,
    /// Namespace and name; none where no Service has the destination.
    pub service: Option<String>,
    pub port_name: Option<String>,
    pub protocol: String,
    /// None of a socket, which has no address yet.
    pub client: Option<String>,
    pub frontend: String,
    /// Of a new flow.
    pub backend: Option<String>,
    /// What the backend sees as its client, where that is not the client; `*` for an address of this node.
    pub source: Option<String>,
    /// Where the client is: `network`, `pod` or `node`.
    pub from: &'static str,
    /// It is about a socket, before it has sent anything.
    pub socket: bool,
    /// Of a socket: its network namespace (SO_NETNS_COOKIE).
    pub netns: Option<u64>,
    pub interface: Option<String>,
    /// The packet's size, link header included.
    pub bytes: u32,
}

/// Events that were not told.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Lost {
    pub time: String,
    /// `lost`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub events: u64,
}

impl Lost {
    pub fn now(events: u64) -> Self {
        let now = Timestamp::try_from(SystemTime::now()).unwrap_or_default();
        Lost { time: text(now), kind: "lost", events }
    }

    pub fn text(&self) -> String {
        format!("{} lost {} events: more than 10,000 a second, or than could be printed", self.time, self.events)
    }
}

/// When CLOCK_MONOTONIC was 0, by the clock on the wall. To be asked once: the order of events must not hang on how long it took
/// to ask two clocks.
pub fn boot() -> Timestamp {
    let since = SignedDuration::from_nanos(host::monotonic_nanoseconds() as i64);
    Timestamp::try_from(SystemTime::now()).unwrap_or_default().checked_sub(since).unwrap_or_default()
}

/// By what addresses are known by name, and times by the clock on the wall.
#[derive(Debug, Default)]
pub struct Names {
    boot: Timestamp,
    state: State,
    /// By a backend's address, port and protocol: its service id, where only one has it.
    backends: HashMap<(Addr, u16, u8), Option<u32>>,
}

impl Names {
    /// `boot`: [`boot`]'s.
    pub fn new(state: State, boot: Timestamp) -> Self {
        let mut backends: HashMap<_, Option<u32>> = HashMap::new();
        for backend in state.backends.values().filter(|backend| backend.live != 0) {
            let key = (backend.addr, backend.port, backend.protocol);
            backends
                .entry(key)
                .and_modify(|service| *service = service.filter(|known| *known == backend.service))
                .or_insert(Some(backend.service));
        }
        Names { boot, state, backends }
    }

    /// The Service that an event is about, and whether its port is the one that was asked for.
    fn of(&self, event: &Event) -> Option<(PortName, bool)> {
        let name = |id: u32| self.state.port_name(id);
        if event.backend != NO_BACKEND
            && let Some(backend) = self.state.backends.get(&event.backend)
        {
            return Some((name(backend.service)?, true));
        }
        if let Some(frontend) = frontend_at(&self.state, event.dst, event.dst_port, event.protocol) {
            return Some((name(frontend.service)?, true));
        }
        // Another port of a Service's address.
        let mut of_address = self.state.frontends.range(FrontendKey::new(event.dst, 0, 0)..);
        if let Some((_, frontend)) =
            of_address.next().filter(|(key, _)| key.addr == event.dst && key.addr != key.addr.any())
        {
            return Some((name(frontend.service)?, false));
        }
        // What a backend sends back.
        let backend = self.backends.get(&(event.src, event.src_port, event.protocol));
        backend.copied().flatten().and_then(|service| Some((name(service)?, true)))
    }
}

impl Line {
    /// None where the event's reason is none that this version knows. `interface`: its name by its number.
    pub fn new(event: &Event, names: &Names, interface: impl FnOnce(u32) -> Option<String>) -> Option<Self> {
        let reason = Reason::from_index(event.reason)?;
        let named = names.of(event);
        let socket = event.from == EVENT_FROM_SOCKET;
        let new = event.to_port != 0;
        let source = if event.masqueraded != 0 {
            Some(format!("*:{}", u16::from_be(event.second_port)))
        } else {
            let other_port = new && !socket && event.second_port != event.src_port;
            other_port.then(|| address_and_port(event.src, event.second_port))
        };
        Some(Line {
            time: text(names.boot.checked_add(SignedDuration::from_nanos(event.time as i64)).unwrap_or_default()),
            kind: reason.kind().map(Kind::label)?,
            reason: reason.label(),
            service: named.as_ref().map(|(name, _)| name.service.to_string()),
            port_name: named
                .filter(|(name, is_its)| *is_its && !name.port.is_empty())
                .map(|(name, _)| name.port.to_string()),
            protocol: Protocol::from_number(event.protocol)
                .map_or_else(|| event.protocol.to_string(), |p| p.to_string()),
            client: (!socket).then(|| address_and_port(event.src, event.src_port)),
            frontend: address_and_port(event.dst, event.dst_port),
            backend: new.then(|| address_and_port(event.to, event.to_port)),
            source,
            from: match event.from {
                EVENT_FROM_NETWORK => "network",
                EVENT_FROM_POD => "pod",
                EVENT_FROM_HOST => "node",
                _ if event.netns == names.state.config.host_netns => "node",
                _ => "pod",
            },
            socket,
            netns: socket.then_some(event.netns),
            interface: (!socket).then(|| interface(event.interface).unwrap_or_else(|| event.interface.to_string())),
            bytes: event.bytes,
        })
    }

    /// A line for eyes, whose parts a script should not take apart.
    pub fn text(&self) -> String {
        let client = match (&self.client, self.from) {
            (Some(client), _) => client.clone(),
            (None, "node") => "a socket of this node".to_owned(),
            (None, _) => "a pod's socket".to_owned(),
        };
        let service = self.service.as_ref().map_or_else(String::new, |service| match &self.port_name {
            Some(port) => format!(" ({service}:{port})"),
            None => format!(" ({service})"),
        });
        let backend = self.backend.as_ref().map_or_else(String::new, |backend| format!(" -> {backend}"));
        let place = self.interface.as_ref().map_or_else(String::new, |interface| match self.from {
            "node" => format!(", from this node by {interface}"),
            "pod" => format!(", from a pod by {interface}"),
            from => format!(", from the {from} by {interface}"),
        });
        format!(
            "{} {:8} {:4} {client} -> {}{service}{backend} [{}{place}]",
            self.time, self.kind, self.protocol, self.frontend, self.reason
        )
    }
}

fn text(time: Timestamp) -> String {
    format!("{time:.6}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::example::state;
    use std::net::IpAddr;
    use svc_common::map::{NO_BACKEND, TCP};

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn line(event: Event) -> Line {
        let mut state = state();
        state.config.host_netns = 7;
        let names = Names::new(state, Timestamp::from_second(1_800_000_000).unwrap());
        Line::new(&event, &names, |index| (index == 2).then(|| "eth0".to_owned())).unwrap()
    }

    fn event(reason: Reason, dst: &str, port: u16) -> Event {
        Event {
            src: addr("192.0.2.9"),
            src_port: 40_000u16.to_be(),
            dst: addr(dst),
            dst_port: port.to_be(),
            reason: reason as u32,
            time: 1_500_000_001_000,
            interface: 2,
            bytes: 74,
            protocol: TCP,
            ..Event::default()
        }
    }

    fn to_backend(event: Event) -> Event {
        Event { to: addr("10.1.0.1"), to_port: 8080u16.to_be(), second_port: 61_000u16.to_be(), backend: 9, ..event }
    }

    #[test]
    fn a_line_names_service_and_backend() {
        let lines = [
            Event { masqueraded: 1, ..to_backend(event(Reason::FlowOpened, "10.96.0.10", 80)) },
            event(Reason::NoBackend, "10.96.0.10", 80),
            event(Reason::UnknownPort, "10.96.0.10", 81),
            event(Reason::UnallocatedAddress, "10.96.9.9", 80),
            Event { interface: 3, from: EVENT_FROM_POD, ..event(Reason::SourceRange, "10.96.0.10", 80) },
            Event { netns: 7, from: EVENT_FROM_SOCKET, ..to_backend(event(Reason::SocketConnected, "10.96.0.10", 80)) },
            Event { netns: 8, from: EVENT_FROM_SOCKET, ..event(Reason::NoBackend, "fd00:96::10", 80) },
            Event { src: addr("10.1.0.1"), src_port: 8080u16.to_be(), ..event(Reason::NoRoute, "192.0.2.1", 9) },
        ];
        let text: Vec<String> = lines.into_iter().map(|event| line(event).text()).collect();
        insta::assert_snapshot!(text.join("\n"), @"
        2027-01-15T08:25:00.000001Z new-flow TCP  192.0.2.9:40000 -> 10.96.0.10:80 (default/web:http) -> 10.1.0.1:8080 [flow_opened, from the network by eth0]
        2027-01-15T08:25:00.000001Z reject   TCP  192.0.2.9:40000 -> 10.96.0.10:80 (default/web:http) [no_backend, from the network by eth0]
        2027-01-15T08:25:00.000001Z reject   TCP  192.0.2.9:40000 -> 10.96.0.10:81 (default/web) [unknown_port, from the network by eth0]
        2027-01-15T08:25:00.000001Z drop     TCP  192.0.2.9:40000 -> 10.96.9.9:80 [unallocated_address, from the network by eth0]
        2027-01-15T08:25:00.000001Z drop     TCP  192.0.2.9:40000 -> 10.96.0.10:80 (default/web:http) [source_range, from a pod by 3]
        2027-01-15T08:25:00.000001Z new-flow TCP  a socket of this node -> 10.96.0.10:80 (default/web:http) -> 10.1.0.1:8080 [socket_connected]
        2027-01-15T08:25:00.000001Z reject   TCP  a pod's socket -> [fd00:96::10]:80 (default/web:http) [no_backend]
        2027-01-15T08:25:00.000001Z drop     TCP  10.1.0.1:8080 -> 192.0.2.1:9 (default/web:http) [no_route, from the network by eth0]
        ");
    }

    #[test]
    fn fields_have_stable_names() {
        let opened = to_backend(event(Reason::FlowOpened, "10.96.0.10", 80));
        insta::assert_snapshot!(serde_json::to_string_pretty(&line(opened)).unwrap(), @r#"
        {
          "time": "2027-01-15T08:25:00.000001Z",
          "type": "new-flow",
          "reason": "flow_opened",
          "service": "default/web",
          "portName": "http",
          "protocol": "TCP",
          "client": "192.0.2.9:40000",
          "frontend": "10.96.0.10:80",
          "backend": "10.1.0.1:8080",
          "source": "192.0.2.9:61000",
          "from": "network",
          "socket": false,
          "netns": null,
          "interface": "eth0",
          "bytes": 74
        }
        "#);
    }

    #[test]
    fn a_reason_of_another_version_is_no_line() {
        let unknown = Event { reason: 31, ..event(Reason::NoBackend, "10.96.0.10", 80) };
        assert_eq!(Line::new(&unknown, &Names::default(), |_| None), None);
    }

    #[test]
    fn an_address_of_two_services_backends_names_neither() {
        let mut state = state();
        let other = svc_common::map::Backend { service: 2, ..*state.backends.get(&9).unwrap() };
        state.backends.insert(77, other);
        let reply =
            Event { src: addr("10.1.0.1"), src_port: 8080u16.to_be(), ..event(Reason::NoRoute, "192.0.2.1", 9) };
        let reply = Event { backend: NO_BACKEND, ..reply };
        assert_eq!(Line::new(&reply, &Names::new(state, Timestamp::default()), |_| None).unwrap().service, None);
    }
}
