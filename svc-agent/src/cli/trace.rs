//! `svc-agent trace`: what becomes of a connection, in words.
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use super::print::{self, Format, Inspect};
use crate::inspect::Pins;
use crate::object::Protocol;
use crate::trace::packet::Ends;
use crate::trace::place::From;
use crate::trace::{self, Answer, Backend, Fate, Question, Served, Socket};

/// A port that no range of source ports has by default, and that a client may choose.
const CLIENT_PORT: u16 = 40_000;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// tcp, udp or sctp.
    #[arg(value_parser = protocol)]
    protocol: Protocol,

    /// The client: ADDRESS or ADDRESS:PORT, a port of 40000 if left out.
    source: Client,

    /// What it connects to: ADDRESS:PORT. An arrow may stand in front: '->'.
    #[arg(value_parser = destination)]
    destination: SocketAddr,

    /// Where the client is [default: as its address says].
    #[arg(long, value_enum)]
    from: Option<From>,

    /// The interface that its packets are met at [default: as the routes say].
    #[arg(long, value_name = "IFACE")]
    interface: Option<String>,

    #[command(flatten)]
    inspect: Inspect,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Client(SocketAddr);

impl FromStr for Client {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        let with_port = text.parse::<SocketAddr>().map(Client);
        with_port
            .or_else(|_| bare.parse::<IpAddr>().map(|address| Client(SocketAddr::new(address, CLIENT_PORT))))
            .map_err(|_| {
                "a client is ADDRESS or ADDRESS:PORT, as in 10.244.1.5, 10.244.1.5:40000 or [fd00::5]:40000".to_owned()
            })
    }
}

fn protocol(text: &str) -> Result<Protocol, String> {
    Protocol::parse(&text.to_uppercase()).ok_or_else(|| "a protocol is tcp, udp or sctp".to_owned())
}

fn destination(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "a destination is ADDRESS:PORT, as in 10.96.0.10:53 or [fd00:96::10]:53".to_owned())
}

/// # Errors
/// Where the pins cannot be read, or the kernel refuses to run the program.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let ends = Ends { source: args.source.0, destination: args.destination };
    anyhow::ensure!(
        ends.source.is_ipv4() == ends.destination.is_ipv4(),
        "{} and {} are not of one family: a Service answers clients of its own",
        ends.source.ip(),
        ends.destination.ip()
    );
    let Args { protocol, from, interface, .. } = args;
    let question = Question { protocol: *protocol, ends, from: *from, interface: interface.clone() };
    let bpffs: &PathBuf = &args.inspect.bpffs;
    let answer = trace::ask(&Pins::open(bpffs)?, &question)?;
    match args.inspect.output {
        Format::Table => print::text(&print::escape(&text(&answer))),
        format => print::data(format, &answer),
    }
}

fn text(answer: &Answer) -> String {
    let Answer { protocol, ends, from, interface, service, note, socket, packet } = answer;
    let client = match from {
        From::Pod => format!("a pod's, at {interface}"),
        From::Node => format!("this node's own, leaving by {interface}"),
        From::Network => format!("from the network, by {interface}"),
    };
    let mut text = format!("{protocol} {} -> {}, {client}\n\n", ends.source, ends.destination);
    let mut line = |name: &str, what: &str| {
        let _ = writeln!(text, "{name:12}{what}");
    };
    match service {
        Some(service) => describe(service, &mut line),
        None => line("Service", note.as_deref().unwrap_or("none: no Service has this address, port and protocol")),
    }
    if let Some(Socket { verdict, reason }) = socket {
        let what = match *verdict {
            "connected" => {
                "connect() leads it straight to one of the backends; none of its packets is translated".to_owned()
            }
            "refused" => format!("connect() fails with ECONNREFUSED ({reason})"),
            _ => format!("connect() leaves it as it is ({reason}); its packets are judged on their way"),
        };
        line("Socket", &what);
    }
    line("Packet", &fate(packet, protocol, service.as_ref()));
    if let Some(after) = &packet.after {
        line("  before", &format!("{} -> {}", ends.source, ends.destination));
        line("  after", &format!("{} -> {}", after.source, after.destination));
    }
    text
}

fn describe(service: &Served, line: &mut impl FnMut(&str, &str)) {
    let port = service.port_name.as_ref().map_or_else(String::new, |port| format!(":{port}"));
    line("Service", &format!("{}/{}{port}, {}", service.namespace, service.name, service.kind));
    if let Some(ranges) = &service.source_ranges {
        line("Sources", &format!("only {}", ranges.join(", ")));
    }
    line(
        "Policy",
        match service.policy {
            "Local" => "Local: this client gets backends of this node only",
            _ => "Cluster: this client may get any backend",
        },
    );
    let backends: Vec<String> = service.backends.iter().map(place).collect();
    line("Backends", if backends.is_empty() { "none".to_owned() } else { backends.join(", ") }.as_str());
    if service.affinity_seconds > 0 {
        let kept = match &service.affine_to {
            Some(backend) => format!("this client stays with {backend}"),
            None => "this client has none yet".to_owned(),
        };
        line("Affinity", &format!("ClientIP for {} s; {kept}", service.affinity_seconds));
    }
}

fn place(backend: &Backend) -> String {
    if backend.local { format!("{} (this node)", backend.address) } else { backend.address.clone() }
}

fn fate(fate: &Fate, protocol: &str, service: Option<&Served>) -> String {
    let Fate { verdict, reason, description, flow, backend, .. } = fate;
    let why = description.split_once(": ").map_or(*description, |(_, why)| why).trim_end_matches('.');
    match (*verdict, backend) {
        ("forwarded", Some(backend)) => {
            let way = if backend.local { "on this node" } else { "elsewhere" };
            let address = &backend.address;
            let chosen = match service {
                _ if *flow == Some("known") => "by a flow that is under way",
                Some(service) if service.affine_to.as_ref() == Some(address) => "by a new flow, as affinity has it",
                Some(service) if service.backends.len() > 1 => "by a new flow; another one may get another backend",
                _ => "by a new flow",
            };
            format!("forwarded to {address}, {way}, {chosen}")
        }
        ("forwarded", None) => format!("forwarded ({reason}): {description}"),
        ("rejected", _) => {
            let by_reset = protocol == "TCP" && ["no_backend", "unknown_port"].contains(reason);
            let answer = if by_reset { "a TCP reset" } else { "an ICMP error" };
            format!("rejected by {answer}: {why} ({reason})")
        }
        (verdict, _) => format!("{verdict}: {why} ({reason})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use svc_common::Reason;

    #[rstest]
    #[case("10.244.1.5", Some("10.244.1.5:40000"))]
    #[case("10.244.1.5:1234", Some("10.244.1.5:1234"))]
    #[case("fd00::5", Some("[fd00::5]:40000"))]
    #[case("[fd00::5]", Some("[fd00::5]:40000"))]
    #[case("[fd00::5]:7", Some("[fd00::5]:7"))]
    #[case("web", None)]
    #[case("10.244.1.5:x", None)]
    fn a_client_is_an_address_with_or_without_a_port(#[case] text: &str, #[case] expected: Option<&str>) {
        let parsed = text.parse::<Client>().ok().map(|client| client.0.to_string());
        assert_eq!(parsed.as_deref(), expected);
    }

    #[test]
    fn an_answer_says_which_service_who_may_serve_and_what_becomes_of_it() {
        let backend = |address: &str, local| Backend { address: address.to_owned(), local };
        let answer = Answer {
            protocol: "TCP".to_owned(),
            ends: Ends { source: "10.244.1.5:40000".parse().unwrap(), destination: "10.96.0.10:53".parse().unwrap() },
            from: From::Pod,
            interface: "veth1".to_owned(),
            service: Some(Served {
                namespace: "kube-system".to_owned(),
                name: "dns".to_owned(),
                port_name: Some("tcp".to_owned()),
                kind: "ClusterIP",
                policy: "Cluster",
                backends: vec![backend("10.244.1.9:53", true), backend("10.244.2.9:53", false)],
                affinity_seconds: 10,
                affine_to: Some("10.244.1.9:53".to_owned()),
                source_ranges: None,
            }),
            note: None,
            socket: Some(Socket { verdict: "connected", reason: "socket_connected" }),
            packet: Fate {
                verdict: "forwarded",
                reason: "flow_hit",
                description: "",
                flow: Some("new"),
                backend: Some(backend("10.244.1.9:53", true)),
                after: Some(Ends {
                    source: "10.244.1.5:28200".parse().unwrap(),
                    destination: "10.244.1.9:53".parse().unwrap(),
                }),
            },
        };
        insta::assert_snapshot!(text(&answer), @"
        TCP 10.244.1.5:40000 -> 10.96.0.10:53, a pod's, at veth1

        Service     kube-system/dns:tcp, ClusterIP
        Policy      Cluster: this client may get any backend
        Backends    10.244.1.9:53 (this node), 10.244.2.9:53
        Affinity    ClientIP for 10 s; this client stays with 10.244.1.9:53
        Socket      connect() leads it straight to one of the backends; none of its packets is translated
        Packet      forwarded to 10.244.1.9:53, on this node, by a new flow, as affinity has it
          before    10.244.1.5:40000 -> 10.96.0.10:53
          after     10.244.1.5:28200 -> 10.244.1.9:53
        ");
    }

    #[test]
    fn a_refusal_says_why_and_how_the_client_hears_of_it() {
        let refused = |verdict, reason: Reason| Fate {
            verdict,
            reason: reason.label(),
            description: reason.description(),
            flow: None,
            backend: None,
            after: None,
        };
        let text = |verdict, reason, protocol| fate(&refused(verdict, reason), protocol, None);
        for (text, expected) in [
            (
                text("rejected", Reason::NoBackend, "TCP"),
                "rejected by a TCP reset: the Service has no ready backend (no_backend)",
            ),
            (
                text("rejected", Reason::NoBackend, "UDP"),
                "rejected by an ICMP error: the Service has no ready backend (no_backend)",
            ),
            (
                text("dropped", Reason::SourceRange, "TCP"),
                "dropped: the source is not in the Service's loadBalancerSourceRanges (source_range)",
            ),
        ] {
            assert_eq!(text, expected);
        }
    }
}
