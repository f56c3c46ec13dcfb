//! A case, step by step, through whatever handles packets and through the model.
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use svc_dataplane::check::{Ends, checksums, view};
use svc_dataplane::memory::Memory;
use svc_dataplane::packet::{Extension, IcmpError, MACS, Packet, SCTP};
use svc_dataplane::socket::Socket;
use svc_dataplane::tables::{Service, Tables};
use svc_dataplane::{Hook, Outcome, Verdict, net};

use crate::case::{Case, Oddity, Shape, SocketKind, SourcePort, Step, Until, What, reply};
use crate::model::Model;
use crate::rules::REJECTED;
use crate::seen::read;
use crate::words;
use crate::world::{World, is_nodes, source};

/// The agent frees the flows that are over as often, in seconds.
pub const SWEEP: u32 = 60;

/// A subject's time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Clock {
    /// It goes by where the subject waits, and nowhere else.
    Stands,
    /// What is limited by it is so for each of these processors.
    Runs { cpus: u32 },
}

/// What is judged.
pub trait Subject {
    /// Pieces that come before their datagram's first one are kept.
    const KEEPS_PIECES: bool;

    /// As many rejections are more than are sent.
    const FLOOD: u32;

    fn clock(&self) -> Clock;
    fn run(&mut self, hook: Hook, frame: &[u8]) -> Outcome;
    /// As many times a frame that is rejected; how far each counter moved, and how long it took.
    fn flood(&mut self, hook: Hook, frame: &[u8], times: u32) -> (BTreeMap<&'static str, u64>, Duration);
    /// The node has these sockets from here on.
    fn set_sockets(&mut self, sockets: &[Socket]);
    fn set_tables(&mut self, tables: &Tables);
    /// Lets this many seconds go by; where they are [`SWEEP`] or more, flows that are over are freed.
    fn wait(&mut self, seconds: u32);
}

impl Subject for Memory {
    const KEEPS_PIECES: bool = false;
    const FLOOD: u32 = 1400;

    fn clock(&self) -> Clock {
        Clock::Stands
    }

    fn flood(&mut self, hook: Hook, frame: &[u8], times: u32) -> (BTreeMap<&'static str, u64>, Duration) {
        let mut moved = BTreeMap::new();
        for (reason, count) in (0..times).flat_map(|_| Memory::run(self, hook, frame).moved) {
            *moved.entry(reason).or_default() += count;
        }
        (moved, Duration::ZERO)
    }

    fn set_sockets(&mut self, sockets: &[Socket]) {
        Memory::set_sockets(self, sockets.to_vec());
    }

    fn run(&mut self, hook: Hook, frame: &[u8]) -> Outcome {
        Memory::run(self, hook, frame)
    }

    fn set_tables(&mut self, tables: &Tables) {
        Memory::set_tables(self, tables.clone());
    }

    fn wait(&mut self, seconds: u32) {
        Memory::wait(self, seconds);
        if seconds >= SWEEP {
            self.sweep();
        }
    }
}

/// How much was seen of what.
#[derive(Clone, Default, Debug)]
pub struct Tally {
    pub cases: u64,
    pub packets: u64,
    pub verdicts: BTreeMap<&'static str, u64>,
    pub reasons: BTreeMap<&'static str, u64>,
    /// Of [`RULES`].
    pub rules: BTreeMap<&'static str, u64>,
}

impl Tally {
    fn add(&mut self, outcome: &Outcome, changed: bool) {
        self.packets += 1;
        let verdict = match (outcome.verdict, changed) {
            (Verdict::Next, true) => "changed, to the stack",
            (Verdict::Next, false) => "untouched, to the stack",
            (Verdict::Drop, _) => "dropped",
            (Verdict::Redirect, _) => "sent on or answered",
        };
        *self.verdicts.entry(verdict).or_default() += 1;
        for (reason, count) in &outcome.moved {
            *self.reasons.entry(reason).or_default() += count;
        }
    }

    /// Of these reasons and rules, those that fewer packets had.
    pub fn rarer<'a>(&self, than: u64, names: &[&'a str]) -> Vec<&'a str> {
        let count = |name: &str| self.reasons.get(name).or(self.rules.get(name)).copied().unwrap_or(0);
        names.iter().copied().filter(|name| count(name) < than).collect()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} packets in {} cases", self.packets, self.cases)?;
        for (name, count) in self.verdicts.iter().chain(&self.reasons).chain(&self.rules) {
            write!(f, "\n  {name:.<40} {count}")?;
        }
        Ok(())
    }
}

/// Reasons that a run of some length is to meet. The others: no helper fails, and sockets are none of the packet path's.
pub const EXPECTED: [&str; 18] = [
    "flow_hit",
    "flow_opened",
    "reply",
    "no_backend",
    "unknown_port",
    "no_local_backend",
    "source_range",
    "unallocated_address",
    "reject_limited",
    "flow_table_full",
    "no_source_port",
    "no_route",
    "hop_limit",
    "too_big",
    "truncated",
    "unsupported",
    "fragment_unknown",
    "fragment_kept",
];

enum Event {
    Packet(Hook, Vec<u8>, Outcome),
    Other(String),
}

struct Run<'a, S> {
    case: &'a Case,
    subject: &'a mut S,
    tally: &'a mut Tally,
    model: Model,
    world: World,
    tables: Tables,
    /// What backends have seen of connections, by their requests.
    seen: HashMap<(u8, Ends), Ends>,
    events: Vec<Event>,
}

/// Runs the case on a subject that has the tables of its first world and no flows.
///
/// # Errors
/// What happened, in words, up to the first outcome that the rules do not allow.
pub fn check<S: Subject>(case: &Case, subject: &mut S, tally: &mut Tally) -> Result<(), String> {
    let world = case.world.clone();
    let model = Model::new(world.clone(), S::KEEPS_PIECES, subject.clock());
    let tables = world.tables();
    tally.cases += 1;
    let mut run = Run { case, subject, tally, model, world, tables, seen: HashMap::new(), events: Vec::new() };
    for step in &case.steps {
        run.step(step).map_err(|difference| run.story(&difference))?;
    }
    Ok(())
}

impl<S: Subject> Run<'_, S> {
    fn step(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Send { connection, what, shape, hook } => {
                let connection = &self.case.connections[connection % self.case.connections.len()];
                let sport = self.sport(connection.sport);
                let Some(request) = sport.map(|sport| connection.request(sport)) else { return Ok(()) };
                // Who is out of reach says nothing: his flows do not show all that was chosen for them.
                let there = self.seen.get(&ends(&request)).copied().filter(|there| net::route(there.dst).is_some());
                let direct =
                    |there: Ends| Packet::new(connection.protocol, there.src, there.sport, there.dst, there.dport);
                let own = there.filter(|there| *what == What::Direct && is_nodes(there.src)).map(|_| Hook::Egress);
                let hook = hook.or(own).unwrap_or(connection.hook);
                let frame = match (what, there) {
                    (What::Request, _) => shape.frame(request, false),
                    (What::Reply, Some(there)) => shape.frame(reply(connection.protocol, there), true),
                    (What::ToSomebodyElse, Some(there)) => {
                        let other = if there.src.is_ipv4() { "203.0.113.99" } else { "2001:db8:c::99" };
                        let other = Ends { src: other.parse().expect("an address"), ..there };
                        shape.frame(reply(connection.protocol, other), true)
                    }
                    (What::ErrorAboutRequest, Some(there)) => shape.error(there.dst, &direct(there)),
                    (What::ErrorAboutReply, Some(_)) => shape.error(connection.client, &request.reply()),
                    (What::Direct, Some(there)) => shape.frame(direct(there), false),
                    (What::ReplyToDirect, Some(there)) => match self.seen.get(&ends(&direct(there))) {
                        Some(there) => shape.frame(reply(connection.protocol, *there), true),
                        None => return Ok(()),
                    },
                    (_, None) => return Ok(()),
                };
                self.send(hook, &frame, shape.oddity.is_sound())
            }
            Step::Crowd { connection, count, until } => self.crowd(*connection, *count, *until),
            Step::Flood { connection, answered } => self.flood(*connection, *answered),
            Step::Sockets { connection, kind, first, count } => self.sockets(*connection, *kind, *first..first + count),
            Step::Wait { seconds } => {
                let seconds = self.model.wait(*seconds);
                self.subject.wait(seconds);
                self.events.push(Event::Other(format!("{seconds} seconds go by")));
                Ok(())
            }
            Step::Backends { service, present } => {
                let first = &self.case.world.services;
                let changed = self.world.services.iter_mut().filter(|known| known.id == *service);
                for known in changed {
                    let all = first.iter().find(|known| known.id == *service).expect("a Service of this case");
                    let there = all.backends.iter().enumerate().filter(|(at, _)| present >> at & 1 != 0);
                    known.backends = there.map(|(_, backend)| *backend).collect();
                    self.tables.put(known);
                    self.events.push(Event::Other(format!("now {}", words::service(known))));
                }
                self.changed()
            }
            Step::Toggle { frontend } => self.toggle(*frontend),
            Step::Bytes { hook, bytes } => self.send(*hook, bytes, false),
        }
    }

    fn sport(&self, port: SourcePort) -> Option<u16> {
        match port {
            SourcePort::Fixed(port) => Some(port),
            SourcePort::GivenTo(connection) => {
                let other = &self.case.connections[connection % self.case.connections.len()];
                let SourcePort::Fixed(port) = other.sport else { return None };
                self.seen.get(&ends(&other.request(port))).map(|there| there.sport)
            }
        }
    }

    fn changed(&mut self) -> Result<(), String> {
        self.model.set_world(&self.world);
        self.subject.set_tables(&self.tables);
        Ok(())
    }

    fn toggle(&mut self, frontend: usize) -> Result<(), String> {
        let first = &self.case.world.services;
        let Some(service) = (!first.is_empty()).then(|| &first[frontend % first.len()]) else { return Ok(()) };
        let same = |other: &Service| (other.id, other.kind) == (service.id, service.kind);
        if let Some(at) = self.world.services.iter().position(same) {
            let gone = self.world.services.remove(at);
            self.tables.remove(&gone);
            self.events.push(Event::Other(format!("gone: {}", words::service(&gone))));
        } else {
            let others = self.world.services.iter().find(|other| other.id == service.id);
            let backends = others.map_or(service.backends.clone(), |other| other.backends.clone());
            let service = Service { backends, ..service.clone() };
            self.tables.put(&service);
            self.events.push(Event::Other(format!("back: {}", words::service(&service))));
            self.world.services.push(service);
        }
        self.changed()
    }

    /// Packets of each: a request, the reply to it and one more request; the end.
    fn crowd(&mut self, connection: usize, count: u16, until: Until) -> Result<(), String> {
        let connection = self.case.connections[connection % self.case.connections.len()];
        // Where flows make room for each other, and all are as old, which of them are left is soon anybody's guess.
        let is_a_guess = self.world.settings.flow_sets == 1 && until != Until::Handshake;
        let count = if is_a_guess { count.min(5) } else { count };
        let shape = |flags| Shape { flags, hop_limit: 64, payload: 1, oddity: Oddity::None };
        for sport in 50_000..50_000 + count {
            let request = connection.request(sport);
            self.send(connection.hook, &shape(0).frame(request.clone(), false), true)?;
            let there = self.seen.get(&ends(&request)).copied().filter(|_| until > Until::Request);
            let Some(there) = there else { continue };
            let hook = way_back(connection.hook, there, &request);
            self.send(hook, &shape(0).frame(reply(connection.protocol, there), true), true)?;
            if until >= Until::Handshake {
                self.send(connection.hook, &shape(2).frame(request.clone(), false), true)?;
            }
            if until >= Until::Reset {
                self.send(connection.hook, &shape(5).frame(request, false), true)?;
            }
        }
        Ok(())
    }

    fn flood(&mut self, connection: usize, answered: bool) -> Result<(), String> {
        let connection = self.case.connections[connection % self.case.connections.len()];
        let request = connection.request(50_000);
        let oddity = match answered {
            true => Oddity::None,
            false if request.is_v4() => Oddity::Options(1),
            false => Oddity::Extensions(vec![Extension::Destination]),
        };
        let frame = Shape { flags: 0, hop_limit: 64, payload: 1, oddity }.frame(request, false);
        self.send(connection.hook, &frame, true)?;
        let Some(Event::Packet(hook, _, outcome)) = self.events.last() else { return Ok(()) };
        let hook = *hook;
        let Some(reason) = REJECTED.into_iter().find(|reason| outcome.moved.contains_key(reason)) else {
            return Ok(());
        };
        let (moved, took) = self.subject.flood(hook, &frame, S::FLOOD);
        for (reason, count) in &moved {
            *self.tally.reasons.entry(reason).or_default() += count;
        }
        self.events.push(Event::Other(format!("{hook:?}: {} times the same, {moved:?}", S::FLOOD)));
        self.model.judge_flood(S::FLOOD, moved.get(reason).copied().unwrap_or(0), &moved, took)
    }

    fn sockets(&mut self, connection: usize, kind: SocketKind, offsets: Range<u16>) -> Result<(), String> {
        let connection = self.case.connections[connection % self.case.connections.len()];
        let (first, last) = self.world.settings.source_ports;
        // Of many ports those of sockets would hardly ever be tried.
        const FEW: u16 = 64;
        if last - first > FEW || connection.protocol == SCTP {
            return Ok(());
        }
        let v4 = connection.to.0.is_ipv4();
        let node = source(net::UPLINK, v4).expect("an address of the node");
        let any = if v4 { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
        let services = self.case.world.services.iter();
        let services =
            services.filter(|service| service.protocol == connection.protocol && service.address.is_ipv4() == v4);
        let mut backends = services.flat_map(|service| &service.backends).map(|(to, port, _)| (*to, *port));
        // A socket is looked for at the address of the link that a packet comes in by, which is not the one that it leaves with
        // by another link: there a socket has to be at any.
        let leaves_apart = |(to, _)| net::route(to).is_some_and(|route| route.interface == net::NARROW);
        let (local, peer) = match kind {
            _ if backends.clone().any(leaves_apart) => (any, None),
            SocketKind::Bound { any: true } => (any, None),
            SocketKind::Bound { any: false } => (node, None),
            SocketKind::Connected => match backends.find(|(to, _)| net::route(*to).is_some()) {
                Some(peer) => (node, Some(peer)),
                None => return Ok(()),
            },
        };
        let ports = offsets.map(|offset| first + offset).filter(|port| *port <= last);
        self.world.sockets =
            ports.map(|port| Socket { protocol: connection.protocol, local: (local, port), peer }).collect();
        self.subject.set_sockets(&self.world.sockets);
        self.model.set_world(&self.world);
        self.events.push(Event::Other(format!("the node has {:?}", self.world.sockets)));
        Ok(())
    }

    /// `sound`: its checksums are right.
    fn send(&mut self, hook: Hook, frame: &[u8], sound: bool) -> Result<(), String> {
        self.pass(hook, frame, sound)?;
        let Some((hook, protocol, request)) = self.model.hidden() else { return Ok(()) };
        // An error about a reply goes to the flow's backend, and leaves the flow as it is.
        let about = Packet::new(protocol, request.dst, request.dport, request.src, request.sport);
        let (kind, code) = if about.is_v4() { (3, 1) } else { (1, 0) };
        let quoted = about.network()[..if about.is_v4() { 28 } else { 48 }].to_vec();
        let error =
            IcmpError { macs: MACS, src: request.src, dst: about.src, kind, code, mtu: 0, hop_limit: 64, quoted };
        self.pass(hook, &error.frame(), true)
    }

    fn pass(&mut self, hook: Hook, frame: &[u8], sound: bool) -> Result<(), String> {
        let handled = catch_unwind(AssertUnwindSafe(|| self.subject.run(hook, frame)));
        let Ok(outcome) = handled else {
            return Err(format!("a panic, by {hook:?}: {}", words::frame(frame)));
        };
        self.tally.add(&outcome, outcome.frame != frame);
        let judged = self.model.judge(hook, frame, &outcome);
        let wrong = sound && outcome.frame != frame && outcome.verdict != Verdict::Drop;
        let sums = if wrong { checksums(&outcome.frame) } else { Ok(()) };
        if outcome.moved.contains_key("flow_hit")
            && let (Ok(before), Ok(after)) = (read(frame), read(&outcome.frame))
            && before.quoted.is_none()
            && sound
            && !view(&outcome.frame).is_fragment
        {
            self.seen.insert((before.protocol, before.ends), after.ends);
        }
        self.events.push(Event::Packet(hook, frame.to_vec(), outcome));
        for rule in judged? {
            *self.tally.rules.entry(rule).or_default() += 1;
        }
        sums
    }

    fn story(&self, difference: &str) -> String {
        let mut text = format!("{}\n", self.case);
        for (at, event) in self.events.iter().enumerate() {
            match event {
                Event::Packet(hook, frame, outcome) => {
                    let moved: Vec<_> = outcome.moved.keys().collect();
                    text += &format!("{at}. {hook:?}: {}\n     {:?}, {moved:?}", words::frame(frame), outcome.verdict);
                    if outcome.frame != *frame {
                        text += &format!(": {}", words::frame(&outcome.frame));
                    }
                    text += "\n";
                }
                Event::Other(event) => text += &format!("{at}. {event}\n"),
            }
        }
        text + difference
    }
}

fn ends(packet: &Packet) -> (u8, Ends) {
    let Packet { src, sport, dst, dport, .. } = *packet;
    (packet.protocol, Ends { src, sport, dst, dport })
}

/// Where the reply to a request is restored.
fn way_back(hook: Hook, there: Ends, request: &Packet) -> Hook {
    let is_here = net::route(there.dst).is_some_and(|route| route.interface == net::POD);
    match hook {
        Hook::Xdp | Hook::Ingress if there.src == request.src => Hook::Egress,
        Hook::PodIngress if there.src == request.src => Hook::PodEgress,
        _ if is_here => Hook::PodIngress,
        _ => Hook::Ingress,
    }
}
