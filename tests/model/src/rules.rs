//! The rules, one after the other.
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::ops::Range;
use std::time::Duration;

use svc_dataplane::check::Ends;
use svc_dataplane::packet::{LINK, MACS, SCTP, UDP};
use svc_dataplane::tables::{Kind, Service};
use svc_dataplane::{Hook, Outcome, Verdict, net};

use crate::chance::Chance;
use crate::flows::{Choice, Direction, Flow, From, Phase, Side};
use crate::refusal::{Fate, Why, answer};
use crate::run::Clock;
use crate::seen::{Piece, Seen, read};
use crate::translate::{Translated, hop, translate};
use crate::words;
use crate::world::{Backend, Destination, World, is_nodes, is_pod, source};

/// What may become of a packet.
struct Expected {
    verdict: Verdict,
    /// `None`: anything.
    frame: Option<Vec<u8>>,
    /// Checksums in which 0 and 0xffff mean the same.
    wrong: Vec<usize>,
    /// Bytes that may be anything.
    anything: Range<usize>,
    /// Counters, each of which moves by one.
    counted: Vec<&'static str>,
}

impl Expected {
    fn is(&self, outcome: &Outcome) -> bool {
        let counted: BTreeMap<&str, u64> = self.counted.iter().map(|label| (*label, 1)).collect();
        let same_frame = |frame: &Vec<u8>| {
            frame.len() == outcome.frame.len() && {
                let with_zeros = |bytes: &[u8]| {
                    let mut bytes = bytes.to_vec();
                    bytes[self.anything.clone()].fill(0);
                    for at in &self.wrong {
                        if bytes[*at..*at + 2] == [0xff, 0xff] {
                            bytes[*at..*at + 2].fill(0);
                        }
                    }
                    bytes
                };
                *frame == outcome.frame || with_zeros(frame) == with_zeros(&outcome.frame)
            }
        };
        self.verdict == outcome.verdict && counted == outcome.moved && self.frame.as_ref().is_none_or(same_frame)
    }
}

/// What session affinity remembers of a client.
#[derive(Clone, PartialEq)]
struct Affinity {
    /// One of these.
    backends: Vec<Backend>,
    last: u32,
    /// The flow that was opened then, if it is not known which backend it got.
    flow: Option<usize>,
}

#[derive(Clone, PartialEq)]
pub(crate) struct Rules {
    world: World,
    /// Pieces that come before their datagram's first one are kept (in the kernel).
    keeps_pieces: bool,
    /// Seconds since some time.
    now: u32,
    /// Flows that are no more are `None`.
    flows: Vec<Option<Flow>>,
    affinity: HashMap<(u32, IpAddr), Affinity>,
    /// The ports of datagrams in pieces, by source, destination, id and protocol.
    pieces: HashMap<Datagram, (u16, u16)>,
    /// How many pieces are kept.
    kept: HashMap<Datagram, u32>,
    /// The flow that the last packet opened.
    opened: Option<usize>,
    clock: Clock,
    /// How many packets were to be rejected since time went by last, where it stands otherwise.
    rejections: u32,
    /// As many directions of flows have room, where it is few.
    places: Option<usize>,
    pub(crate) chance: Chance,
    /// Which rules the last packet has met, of those that are counted.
    met: Vec<&'static str>,
}

/// Rejections that are sent in a step of [`REJECTION_STEP`]: ten thousand a second.
const REJECTIONS: u32 = 1342;
const REJECTION_STEP: Duration = Duration::from_nanos(1 << 27);
/// Reasons to reject.
pub(crate) const REJECTED: [&str; 4] = ["no_backend", "unknown_port", "too_big", "hop_limit"];

/// Rules that a run of some length is to meet beside the reasons.
pub const RULES: [&str; 7] = [OUTLIVED, CLOSED, HALF_OPEN, PUT_BACK, PAST_SOCKETS, ONLY_SOCKETS, SHADOWED];
const OUTLIVED: &str = "an outlived flow makes room";
const CLOSED: &str = "a closed flow makes room";
const HALF_OPEN: &str = "a half-open flow makes room";
const PUT_BACK: &str = "a direction is put back";
const PAST_SOCKETS: &str = "a port beside sockets' is found";
const ONLY_SOCKETS: &str = "there are sockets at all ports";
const SHADOWED: &str = "a connection makes way for a flow";

type Datagram = (IpAddr, IpAddr, u32, u8);

/// As many pieces of one datagram are kept.
const PIECES_KEPT: u32 = 8;

fn origin(hook: Hook) -> From {
    match hook {
        Hook::Xdp | Hook::Ingress => From::Network,
        Hook::PodIngress => From::Pod,
        Hook::Egress | Hook::PodEgress => From::Host,
    }
}

/// A packet at hand.
struct Packet<'a> {
    hook: Hook,
    from: From,
    frame: &'a [u8],
    seen: Seen,
    /// What was made of it, to learn from it what was chosen at random.
    outcome: &'a Outcome,
}

impl Packet<'_> {
    /// The source port that the backend sees, where the packet went on towards one.
    fn port_seen(&self) -> Option<u16> {
        if self.seen.piece == Piece::Later {
            return None;
        }
        let at = match self.seen.quoted {
            Some(quoted) => quoted.l4 + 2,
            None => self.seen.l4,
        };
        let bytes = self.outcome.frame.get(at..at + 2)?;
        Some(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn untouched(&self, verdict: Verdict, counted: Vec<&'static str>) -> Expected {
        Expected { verdict, frame: Some(self.frame.to_vec()), wrong: Vec::new(), anything: 0..0, counted }
    }
}

impl Rules {
    /// Where room is short less time would leave open which flow has waited longer, or has told its other direction of it.
    pub(crate) const LEAST_WAIT: u32 = 20;

    pub(crate) fn new(world: World, keeps_pieces: bool, clock: Clock) -> Self {
        // Four to a set. Where one is all that there is, every direction may have every place.
        let places = (world.settings.flow_sets == 1).then_some(4);
        Rules {
            world,
            keeps_pieces,
            now: 0,
            flows: Vec::new(),
            affinity: HashMap::new(),
            pieces: HashMap::new(),
            kept: HashMap::new(),
            opened: None,
            clock,
            rejections: 0,
            places,
            chance: Chance::default(),
            met: Vec::new(),
        }
    }

    pub(crate) fn set_world(&mut self, world: World) {
        self.world = world;
    }

    pub(crate) fn is_small(&self) -> bool {
        self.places.is_some()
    }

    /// No packet leaves a choice that is not seen at once.
    pub(crate) fn is_certain(&self) -> bool {
        !self.is_small() && self.world.sockets.is_empty() && !self.flows.iter().flatten().any(|flow| flow.is_doubtful)
    }

    pub(crate) fn take_met(&mut self) -> Vec<&'static str> {
        std::mem::take(&mut self.met)
    }

    /// Whether nobody can tell after these seconds which flows are over.
    pub(crate) fn is_in_doubt(&self, seconds: u32) -> bool {
        self.flows.iter().flatten().any(|flow| flow.is_in_doubt(self.now + seconds))
    }

    pub(crate) fn wait(&mut self, seconds: u32, swept: bool) {
        self.now += seconds;
        if seconds > 0 {
            self.rejections = 0;
        }
        if swept {
            let now = self.now;
            for flow in &mut self.flows {
                *flow = flow.take().filter(|flow| !flow.is_outlived(now));
            }
        }
    }

    /// A flow that the last packet opened and did not show: where it came from, its protocol and the ends of its requests.
    pub(crate) fn hidden(&self) -> Option<(Hook, u8, Ends)> {
        let flow = self.flows[self.opened?].as_ref()?;
        let hook = match flow.from {
            From::Network => Hook::Ingress,
            From::Pod => Hook::PodIngress,
            From::Host => Hook::Egress,
        };
        let is_known = matches!(flow.choices[..], [Choice { port: Some(_), .. }]);
        (!is_known).then_some((hook, flow.protocol, flow.request))
    }

    /// As [`crate::Model::judge`], of the choices that `chance` says.
    pub(crate) fn judge(&mut self, hook: Hook, frame: &[u8], outcome: &Outcome) -> Result<(), String> {
        self.opened = None;
        self.allow(hook, frame, outcome)?;
        let is_rejection = |label: &&str| REJECTED.contains(label) || *label == "reject_limited";
        if hook != Hook::Xdp && self.clock == Clock::Stands && outcome.moved.keys().any(is_rejection) {
            self.rejections += 1;
        }
        Ok(())
    }

    pub(crate) fn judge_flood(
        &mut self,
        times: u32,
        rejected: u64,
        moved: &BTreeMap<&'static str, u64>,
        took: Duration,
    ) -> Result<(), String> {
        let least = times.min(REJECTIONS.saturating_sub(self.rejections));
        let most = match self.clock {
            Clock::Stands => least,
            Clock::Runs { cpus } => {
                let steps = took.as_nanos() / REJECTION_STEP.as_nanos() + 2;
                times.min(REJECTIONS * steps as u32 * cpus)
            }
        };
        if self.clock == Clock::Stands {
            self.rejections += times;
        }
        let limited = moved.get("reject_limited").copied().unwrap_or(0);
        let is_allowed = (u64::from(least)..=u64::from(most)).contains(&rejected);
        if is_allowed && rejected + limited == u64::from(times) && moved.values().sum::<u64>() == u64::from(times) {
            Ok(())
        } else {
            Err(format!("expected: {least} to {most} of {times} packets rejected, all others limited\ngot: {moved:?}"))
        }
    }

    fn pick(&mut self, of: usize) -> usize {
        if of > 1 { self.chance.pick(of) } else { 0 }
    }

    fn allow(&mut self, hook: Hook, frame: &[u8], outcome: &Outcome) -> Result<(), String> {
        let seen = match read(frame) {
            Ok(seen) => seen,
            Err(why) => return self.passed_on(hook, frame, outcome, why),
        };
        if hook == Hook::Xdp && !seen.is_plain() {
            return self.passed_on(hook, frame, outcome, Why::NotService);
        }
        let mut packet = Packet { hook, from: origin(hook), frame, seen, outcome };
        let datagram = (packet.seen.src, packet.seen.dst, packet.seen.id, packet.seen.protocol);
        match packet.seen.piece {
            Piece::Whole => (),
            Piece::First => {
                self.pieces.insert(datagram, (packet.seen.ends.sport, packet.seen.ends.dport));
            }
            Piece::Later => match self.pieces.get(&datagram) {
                Some(ports) => (packet.seen.ends.sport, packet.seen.ends.dport) = *ports,
                None => return self.early_piece(&packet, datagram),
            },
        }
        let is_first = packet.seen.piece == Piece::First;
        let released = is_first && packet.from != From::Host && self.kept.remove(&datagram).is_some();
        self.decide(&packet, released)
    }

    fn passed_on(&self, hook: Hook, frame: &[u8], outcome: &Outcome, why: Why) -> Result<(), String> {
        let counted = if hook == Hook::Xdp { None } else { why.label() };
        let frame = Some(frame.to_vec());
        let expected = Expected {
            verdict: Verdict::Next,
            frame,
            wrong: Vec::new(),
            anything: 0..0,
            counted: Vec::from_iter(counted),
        };
        one_of(&[expected], outcome).map(|_| ())
    }

    /// A piece without ports, before the one that has them.
    fn early_piece(&mut self, packet: &Packet<'_>, datagram: Datagram) -> Result<(), String> {
        let comes_in = packet.from != From::Host;
        let count = self.kept.get(&datagram).copied().unwrap_or(0);
        let room = count < PIECES_KEPT;
        let why = if self.keeps_pieces && comes_in && room && self.world.is_known(packet.seen.dst) {
            self.kept.insert(datagram, count + 1);
            Why::FragmentKept
        } else {
            Why::FragmentUnknown
        };
        self.refused(packet, why, false)
    }

    /// `released`: the packet and those that waited for it are sent up the same interface again.
    fn decide(&mut self, packet: &Packet<'_>, released: bool) -> Result<(), String> {
        self.settle_doubts(packet);
        let found = self.follow(packet);
        let Some((index, direction)) = found else {
            if packet.hook == Hook::PodEgress && !self.is_shadowed(packet) {
                return self.refused(packet, Why::NotService, released);
            }
            return self.open(packet, released);
        };
        let flow = self.flows[index].as_ref().expect("a flow that was found");
        let own = flow.from == From::Host;
        let is_reply = direction == Direction::Reply;
        let goes_on = match packet.from {
            // Replies that stay on this node, or leave it, are restored where they go out: but for the node's own.
            From::Network | From::Pod => !is_reply || own || flow.choices[0].masqueraded,
            // A request of somebody else's was translated before, and so was a reply to the node.
            From::Host => is_reply != own,
        };
        if !goes_on {
            return self.refused(packet, Why::NotService, released);
        }
        let choices = flow.choices.clone();
        let expected: Vec<_> =
            choices.iter().map(|choice| self.delivered(packet, index, choice, direction, &[], released)).collect();
        let expected = expected.into_iter().collect::<Result<Vec<_>, _>>()?;
        let (outcomes, choices): (Vec<_>, Vec<_>) = expected.into_iter().unzip();
        let matching = one_of(&outcomes, packet.outcome)?;
        self.settle(index, matching.iter().map(|at| choices[*at].clone()).collect());
        Ok(())
    }

    /// The packet's flow, which it keeps alive.
    fn follow(&mut self, packet: &Packet<'_>) -> Option<(usize, Direction)> {
        let Packet { seen, from, .. } = packet;
        let (first, next) = self.masqueraded_ports();
        let to_node = *from != From::Host && is_nodes(seen.ends.dst) && (first..next).contains(&seen.ends.dport);
        let find = |by_port: bool| {
            let mut flows = self.flows.iter().enumerate().filter_map(|(index, flow)| Some((index, flow.as_ref()?)));
            flows.find_map(|(index, flow)| Some((index, flow.direction(seen.protocol, seen.ends, by_port)?)))
        };
        let (index, direction) = to_node.then(|| find(true)).flatten().or_else(|| find(false))?;
        if seen.quoted.is_some() {
            return Some((index, direction));
        }
        let begins_anew = seen.is_syn() || seen.protocol == UDP;
        let flow = self.flows[index].as_ref().expect("a flow that was found");
        if direction == Direction::Request && begins_anew {
            let is_closed = seen.is_syn() && flow.phase() == Phase::Closed;
            // Where one of several backends is meant they are all of one Service, and none has left since: it is asked at once.
            let has_left = flow.choices[0].backend.is_some_and(|backend| !self.world.has_backend(backend));
            if is_closed || has_left || flow.is_outlived(self.now) {
                self.flows[index] = None;
                return None;
            }
        }
        let now = self.now;
        let flow = self.flows[index].as_mut().expect("a flow that was found");
        let idle = now - flow.sides[direction as usize].since;
        let is_news = flow.learn(seen, direction, now);
        self.tell(index, direction, is_news, idle);
        Some((index, direction))
    }

    /// The flow's other direction is told of a packet: where there is news, and now and then. Where it has lost its place it gets
    /// one again, if it can.
    fn tell(&mut self, index: usize, direction: Direction, is_news: bool, idle: u32) {
        let other = direction.other();
        let is_here = self.flows[index].as_ref().expect("a flow that was found").has(other);
        let may_tick = !is_here && self.clock != Clock::Stands;
        if !is_news && idle < Self::LEAST_WAIT && !(may_tick && self.pick(2) == 1) {
            return;
        }
        if is_here {
            self.flows[index].as_mut().expect("a flow that was found").sides[other as usize].since = self.now;
        } else if self.place(index, other) {
            self.met.push(PUT_BACK);
        }
    }

    /// Room for both directions of a new flow.
    fn make_place(&mut self, index: usize, choice: &Choice) -> bool {
        if let Some(port) = choice.port {
            for holder in self.holders(index, choice, port) {
                self.flows[holder] = None;
            }
        }
        self.place(index, Direction::Reply) && self.place(index, Direction::Request)
    }

    /// A place that is free, or an outlived flow's; else a closed one's, else a half-open one's, the oldest first. Never one of a
    /// flow that lives; and where it would be the flow's own other one, none.
    fn place(&mut self, index: usize, direction: Direction) -> bool {
        let places = self.places.expect("a small table");
        let sides = (0..self.flows.len()).flat_map(|at| Direction::BOTH.map(|side| (at, side)));
        let has = |(at, side): &(usize, Direction)| self.flows[*at].as_ref().is_some_and(|flow| flow.has(*side));
        let taken: Vec<_> = sides.filter(has).collect();
        if taken.len() >= places {
            let of = |(at, _): &(usize, Direction)| self.flows[*at].as_ref().expect("a flow that has a place");
            let worth = |taken: &(usize, Direction)| match of(taken) {
                flow if flow.is_outlived(self.now) => Some(OUTLIVED),
                flow if flow.phase() == Phase::Closed => Some(CLOSED),
                flow if flow.phase() == Phase::New => Some(HALF_OPEN),
                _ => None,
            };
            let ranks = [OUTLIVED, CLOSED, HALF_OPEN];
            let best = ranks.into_iter().find(|rank| taken.iter().any(|taken| worth(taken) == Some(*rank)));
            let Some(first) = best else { return false };
            let since = |taken: &(usize, Direction)| of(taken).sides[taken.1 as usize].since;
            let mut dispensable: Vec<_> = taken.iter().copied().filter(|taken| worth(taken) == Some(first)).collect();
            let oldest = dispensable.iter().map(since).min();
            dispensable.retain(|taken| Some(since(taken)) == oldest);
            let (at, side) = dispensable[self.pick(dispensable.len())];
            if at == index {
                return false;
            }
            self.met.push(first);
            let flow = self.flows[at].as_mut().expect("a flow that has a place");
            flow.sides[side as usize].is_here = false;
            if !flow.has(side.other()) {
                self.flows[at] = None;
            }
        }
        let flow = self.flows[index].as_mut().expect("a flow that was found");
        flow.sides[direction as usize] = Side { is_here: true, since: self.now };
        true
    }

    /// Flows that may have been given up, and that this packet asks for.
    fn settle_doubts(&mut self, packet: &Packet<'_>) {
        let Packet { seen, .. } = packet;
        let Ends { src, sport, dst, dport } = seen.ends;
        let back = Ends { src: dst, sport: dport, dst: src, dport: sport };
        let is_asked_for = |flow: &Flow| {
            let asks = |ends, by_port| flow.direction(seen.protocol, ends, by_port).is_some();
            flow.is_doubtful
                && [(seen.ends, false), (seen.ends, true), (back, false), (back, true)]
                    .iter()
                    .any(|(ends, by_port)| asks(*ends, *by_port))
        };
        let asked_for: Vec<_> =
            (0..self.flows.len()).filter(|at| self.flows[*at].as_ref().is_some_and(is_asked_for)).collect();
        for at in asked_for {
            self.settle_doubt(at);
        }
    }

    fn settle_doubt(&mut self, at: usize) {
        let Some(flow) = &mut self.flows[at] else { return };
        if !std::mem::take(&mut flow.is_doubtful) {
            return;
        }
        if self.pick(2) == 1 {
            self.flows[at] = None;
        }
    }

    /// Who has a port that a socket has, too, may have given it up to this flow, which has not taken it then.
    fn doubt_holders(&mut self, index: usize, choices: &[Choice]) {
        if self.world.sockets.is_empty() {
            return;
        }
        let mut doubtful = Vec::new();
        for choice in choices {
            let ports = self.world.sockets.iter().map(|socket| socket.local.1);
            for port in ports.filter(|port| self.is_a_sockets(index, choice, *port)) {
                let lives = |phase: Phase| matches!(phase, Phase::Established | Phase::Closing);
                if !self.holders_phase(index, choice, port).is_some_and(lives) {
                    doubtful.extend(self.holders(index, choice, port));
                }
            }
        }
        for at in doubtful {
            self.flows[at].as_mut().expect("a flow that was found").is_doubtful = true;
        }
    }

    /// Whether a socket of this node would get what the backend sends to this port of such a flow. The sender's own socket is
    /// meant to.
    fn is_a_sockets(&self, index: usize, choice: &Choice, port: u16) -> bool {
        let flow = self.flows[index].as_ref().expect("a flow that was found");
        let local = if choice.masqueraded {
            net::route(choice.to.0).and_then(|route| source(route.interface, choice.to.0.is_ipv4()))
        } else {
            (flow.from == From::Host && port != flow.request.sport).then_some(flow.request.src)
        };
        // The kernel does not say where SCTP's are.
        let mut sockets = self.world.sockets.iter().filter(|socket| socket.protocol != SCTP);
        local.is_some_and(|local| sockets.any(|socket| socket.gets(flow.protocol, choice.to, (local, port))))
    }

    /// Sockets have at least an eighth of the ports that this flow could have.
    fn has_many_sockets(&self, index: usize, choice: &Choice) -> bool {
        let (first, next) =
            self.ports(self.flows[index].as_ref().expect("a flow that was found").from, choice.masqueraded);
        let sockets =
            || self.world.sockets.iter().map(|socket| socket.local.1).filter(|port| (first..next).contains(port));
        sockets().any(|_| true)
            && 8 * sockets().filter(|port| self.is_a_sockets(index, choice, *port)).count() >= usize::from(next - first)
    }

    fn masqueraded_ports(&self) -> (u16, u16) {
        let (first, last) = self.world.settings.source_ports;
        (first, last - (last - first) / 8)
    }

    /// Ports for such a flow, first and one after the last.
    fn ports(&self, from: From, masqueraded: bool) -> (u16, u16) {
        let (first, moved) = self.masqueraded_ports();
        let last = self.world.settings.source_ports.1;
        let middle = moved + (last - moved) / 2;
        match (masqueraded, from) {
            (true, _) => (first, moved),
            (false, From::Network) => (moved, middle),
            (false, _) => (middle, last),
        }
    }

    fn open(&mut self, packet: &Packet<'_>, released: bool) -> Result<(), String> {
        let seen = &packet.seen;
        let (mut choices, affinity) = match self.balance(packet) {
            Ok(chosen) => chosen,
            Err(Why::NotService) if self.is_shadowed(packet) => {
                let to = (seen.ends.dst, seen.ends.dport);
                (vec![Choice { to, backend: None, masqueraded: false, port: None }], None)
            }
            Err(why) => return self.refused(packet, why, released),
        };
        if self.is_small() {
            let chosen = self.pick(choices.len());
            choices = vec![choices.swap_remove(chosen)];
        }
        if choices[0].backend.is_none() {
            self.met.push(SHADOWED);
        }
        let index = self.flows.len();
        let side = Side { is_here: !self.is_small(), since: self.now };
        let flow = Flow {
            protocol: seen.protocol,
            request: seen.ends,
            from: packet.from,
            life: Default::default(),
            last: self.now,
            choices: choices.clone(),
            sides: [side; 2],
            is_doubtful: false,
        };
        self.flows.push(Some(flow));
        for port in [Some(seen.ends.sport), packet.port_seen()].into_iter().flatten() {
            let holders: Vec<_> = choices.iter().flat_map(|choice| self.holders(index, choice, port)).collect();
            for holder in holders {
                self.settle_doubt(holder);
            }
        }
        if let Some(key) = affinity {
            let backends = choices.iter().filter_map(|choice| choice.backend).collect();
            self.affinity.insert(key, Affinity { backends, last: self.now, flow: Some(index) });
        }
        let keeps: Vec<_> = choices.iter().map(|choice| self.keeps_port(index, choice)).collect();
        for (choice, keeps) in choices.iter_mut().zip(keeps) {
            choice.port = keeps.then_some(seen.ends.sport);
        }
        // No port is numbered 0: where it was to stay, as SCTP's does, there is none.
        let offered = choices.len();
        choices.retain(|choice| choice.port != Some(0));
        if choices.is_empty() {
            self.flows[index] = None;
            return self.refused(packet, Why::NoSourcePort, released);
        }
        if self.is_small() && !self.make_place(index, &choices[0]) {
            self.flows[index] = None;
            return self.refused(packet, Why::FlowTableFull, released);
        }
        let opened: &[&'static str] = &["flow_opened"];
        let delivered: Result<Vec<_>, String> = choices
            .iter()
            .map(|choice| self.delivered(packet, index, choice, Direction::Request, opened, released))
            .collect();
        let (mut outcomes, mut settled): (Vec<_>, Vec<_>) = delivered?.into_iter().unzip();
        let full = choices.len() < offered || choices.iter().any(|choice| self.is_mostly_taken(index, choice));
        let crowded = choices.iter().any(|choice| self.has_many_sockets(index, choice));
        if full || crowded {
            outcomes.push(self.refusal(packet, Why::NoSourcePort, &[], released));
        }
        let matching = one_of(&outcomes, packet.outcome)?;
        settled = matching.iter().filter_map(|at| settled.get(*at).cloned()).collect();
        self.doubt_holders(index, &choices);
        if crowded {
            self.met.push(if settled.is_empty() { ONLY_SOCKETS } else { PAST_SOCKETS });
        }
        if settled.is_empty() {
            self.flows[index] = None;
            return Ok(());
        }
        self.opened = Some(index);
        self.settle(index, settled);
        Ok(())
    }

    /// What is left of the flow's choices after a packet.
    fn settle(&mut self, index: usize, choices: Vec<Choice>) {
        if let [Choice { port: Some(port), .. }] = choices[..] {
            // Who had the port before has given it up.
            let holders = self.holders(index, &choices[0], port);
            for holder in holders {
                self.flows[holder] = None;
            }
        }
        for affinity in self.affinity.values_mut().filter(|affinity| affinity.flow == Some(index)) {
            affinity.backends = choices.iter().filter_map(|choice| choice.backend).collect();
        }
        self.flows[index].as_mut().expect("a flow that was found").choices = choices;
    }

    /// The backends that a new flow may go to, and what affinity knows its client by.
    #[expect(clippy::type_complexity, reason = "both are read at once")]
    fn balance(&self, packet: &Packet<'_>) -> Result<(Vec<Choice>, Option<(u32, IpAddr)>), Why> {
        let seen = &packet.seen;
        let service = match self.world.destination(seen.ends.dst, seen.ends.dport, seen.protocol) {
            Destination::Frontend(service) => service,
            Destination::UnknownPort => return Err(Why::UnknownPort),
            Destination::Unallocated => return Err(Why::UnallocatedAddress),
            Destination::Other => return Err(Why::NotService),
        };
        let client = seen.ends.src;
        if let Some(ranges) = &service.source_ranges
            && !ranges.iter().any(|(base, length)| net::contains(&format!("{base}/{length}"), client))
        {
            return Err(Why::SourceRange);
        }
        let is_outside = packet.from == From::Network;
        let local_only = match service.kind {
            Kind::ClusterIp => service.internal_local,
            _ => is_outside && service.external_local,
        };
        let mut backends: Vec<_> = service.backends.iter().filter(|backend| backend.2 || !local_only).collect();
        if backends.is_empty() {
            return Err(if service.backends.is_empty() { Why::NoBackend } else { Why::NoLocalBackend });
        }
        if seen.quoted.is_some() || seen.protocol != UDP && seen.flags.rst {
            return Err(Why::NotService);
        }
        let key = (service.affinity_seconds > 0).then_some((service.id, client));
        if let Some(last) = key.and_then(|key| self.affinity.get(&key))
            && self.now - last.last <= service.affinity_seconds
        {
            let is_last = |backend: &&(IpAddr, u16, bool)| last.backends.contains(&(backend.0, backend.1, service.id));
            let known: Vec<_> = backends.iter().copied().filter(is_last).collect();
            if known.len() == last.backends.len() {
                backends = known;
            }
        }
        let choice = |(to, port, local): &(IpAddr, u16, bool)| Choice {
            to: (*to, *port),
            backend: Some((*to, *port, service.id)),
            masqueraded: self.masquerades(packet.from, client, service, (*to, *local)),
            port: None,
        };
        Ok((backends.into_iter().map(choice).collect(), key))
    }

    /// Whether the backend is to see this node: where its replies would not come back here by themselves, where it is its own
    /// client, and where the agent was told so.
    fn masquerades(&self, from: From, client: IpAddr, service: &Service, (to, local): (IpAddr, bool)) -> bool {
        let settings = &self.world.settings;
        let cluster_ip = service.kind == Kind::ClusterIp;
        let detects = if client.is_ipv4() { settings.detect_pods_v4 } else { settings.detect_pods_v6 };
        match from {
            From::Network => !local || cluster_ip && settings.masquerade_all,
            From::Pod => to == client || cluster_ip && (settings.masquerade_all || detects && !is_pod(client)),
            From::Host => false,
        }
    }

    /// A connection of this node or its pods that is no Service's, whose replies some flow would get.
    fn is_shadowed(&self, packet: &Packet<'_>) -> bool {
        let Packet { seen, from, .. } = packet;
        let Ends { src, sport, dst, dport } = seen.ends;
        let (first, last) = self.world.settings.source_ports;
        if *from == From::Network
            || seen.quoted.is_some()
            || !(first..=last).contains(&sport)
            || !(seen.protocol == UDP || seen.is_syn())
            || *from == From::Host && !is_nodes(src)
        {
            return false;
        }
        let reply = Ends { src: dst, sport: dport, dst: src, dport: sport };
        self.flows.iter().flatten().any(|flow| {
            flow.direction(seen.protocol, reply, false).is_some()
                || *from == From::Host && flow.direction(seen.protocol, reply, true).is_some()
        })
    }

    /// Other flows whose replies would be the same.
    fn holders(&self, index: usize, choice: &Choice, port: u16) -> Vec<usize> {
        let flow = self.flows[index].as_ref().expect("a flow that was found");
        let node = flow.request.src;
        let reply = Ends { src: choice.to.0, sport: choice.to.1, dst: node, dport: port };
        let mut others = self.flows.iter().enumerate().filter_map(|(at, other)| Some((at, other.as_ref()?)));
        let holds = |other: &Flow| other.direction(flow.protocol, reply, choice.masqueraded).is_some();
        others.by_ref().filter(|(at, other)| *at != index && holds(other)).map(|(at, _)| at).collect()
    }

    /// Flows towards the same backend, that live or may, take at least half of the ports that this one could have.
    fn is_mostly_taken(&self, index: usize, choice: &Choice) -> bool {
        let flow = self.flows[index].as_ref().expect("a flow that was found");
        let (first, next) = self.ports(flow.from, choice.masqueraded);
        let takes = |other: &Flow| {
            other.protocol == flow.protocol
                && (choice.masqueraded || other.request.src == flow.request.src)
                && other.choices.iter().any(|taken| {
                    taken.to == choice.to
                        && taken.masqueraded == choice.masqueraded
                        && taken.port.is_none_or(|port| (first..next).contains(&port))
                })
        };
        let others =
            self.flows.iter().enumerate().filter(|(at, other)| *at != index && other.as_ref().is_some_and(takes));
        2 * others.count() >= usize::from(next - first)
    }

    /// How far the flows are that have this source port.
    fn holders_phase(&self, index: usize, choice: &Choice, port: u16) -> Option<Phase> {
        let phase = |at: usize| {
            let holder = self.flows[at].as_ref().expect("a flow that was found");
            if holder.is_outlived(self.now) { Phase::Closed } else { holder.phase() }
        };
        let phases = self.holders(index, choice, port).into_iter().map(phase);
        phases.max_by_key(|phase| match phase {
            Phase::Closed => 0,
            Phase::New => 1,
            Phase::Established | Phase::Closing => 2,
        })
    }

    fn is_vacant(&self, index: usize, choice: &Choice, port: u16) -> bool {
        matches!(self.holders_phase(index, choice, port), None | Some(Phase::Closed))
    }

    /// A privileged port and SCTP's are to stay where the client keeps its address; a connection that is no Service's has to move.
    fn prefers_own_port(&self, index: usize, choice: &Choice) -> bool {
        let flow = self.flows[index].as_ref().expect("a flow that was found");
        choice.backend.is_some()
            && !choice.masqueraded
            && ((1..1024).contains(&flow.request.sport) || flow.protocol == SCTP)
    }

    fn keeps_port(&self, index: usize, choice: &Choice) -> bool {
        let own = self.flows[index].as_ref().expect("a flow that was found").request.sport;
        self.prefers_own_port(index, choice) && self.is_vacant(index, choice, own)
    }

    /// Whether a new flow may have this source port.
    fn may_have(&self, index: usize, choice: &Choice, port: u16) -> Result<(), String> {
        let flow = self.flows[index].as_ref().expect("a flow that was found");
        let own = flow.request.sport;
        let (first, next) = self.ports(flow.from, choice.masqueraded);
        let taken = self.is_mostly_taken(index, choice);
        if self.is_a_sockets(index, choice, port) {
            return Err(format!("a socket of this node gets what comes back to its source port {port}"));
        }
        if self.keeps_port(index, choice) {
            return if port == own { Ok(()) } else { Err(format!("its source port is {port}, and {own} was to stay")) };
        }
        if port == own && !choice.masqueraded && !(first..next).contains(&port) {
            // A half-open flow gives the port up only to one that is to keep it.
            let is_given = match self.holders_phase(index, choice, own) {
                None | Some(Phase::Closed) => true,
                Some(Phase::New) => self.prefers_own_port(index, choice),
                Some(Phase::Established | Phase::Closing) => false,
            };
            return if is_given && taken {
                Ok(())
            } else {
                Err(format!("it keeps its source port {own}, though others are free or that one is not"))
            };
        }
        if !(first..next).contains(&port) {
            return Err(format!("its source port is {port}, and none of {first} to {}", next - 1));
        }
        match self.holders_phase(index, choice, port) {
            None | Some(Phase::Closed) => Ok(()),
            // Where there is a handshake a half-open flow's turn is over; else there was no free port.
            Some(Phase::New) if choice.masqueraded && flow.protocol != UDP || taken => Ok(()),
            Some(phase) => {
                Err(format!("its source port {port} is that of another flow ({phase:?}) to the same backend"))
            }
        }
    }

    /// What becomes of a packet of this flow, and the choice with the source port that was seen.
    fn delivered(
        &self,
        packet: &Packet<'_>,
        index: usize,
        choice: &Choice,
        direction: Direction,
        opened: &[&'static str],
        released: bool,
    ) -> Result<(Expected, Choice), String> {
        let hidden = choice.port.is_none();
        let mut known = Choice { port: choice.port.or_else(|| packet.port_seen()), ..choice.clone() };
        let flow = self.flows[index].as_ref().expect("a flow that was found");
        if hidden && flow.protocol == SCTP && packet.seen.piece != Piece::Whole {
            // Such a piece goes on only where its port happens to stay.
            let own = flow.request.sport;
            let stays = packet.outcome.moved.contains_key("flow_hit") && self.may_have(index, choice, own).is_ok();
            known.port = stays.then_some(own);
        }
        let port = known.port.unwrap_or(0);
        let sent = if released { Err(Why::FragmentKept) } else { send_on(packet, flow, &known, direction, port) };
        let (verdict, Translated { frame, wrong, anything }) = match sent {
            Ok(sent) => sent,
            Err(why) => return Ok((self.refusal(packet, why, opened, released), choice.clone())),
        };
        let label = if direction == Direction::Reply { "reply" } else { "flow_hit" };
        let counted = [opened, &[label]].concat();
        let expected = Expected { verdict, frame: Some(frame), wrong, anything, counted };
        if hidden && known.port.is_some() && expected.is(packet.outcome) {
            self.may_have(index, &known, port)?;
        }
        Ok((expected, known))
    }

    fn refused(&self, packet: &Packet<'_>, why: Why, released: bool) -> Result<(), String> {
        one_of(&[self.refusal(packet, why, &[], released)], packet.outcome).map(|_| ())
    }

    fn refusal(&self, packet: &Packet<'_>, why: Why, opened: &[&'static str], released: bool) -> Expected {
        let opened = opened.to_vec();
        if released {
            return Expected {
                verdict: Verdict::Drop,
                frame: None,
                wrong: Vec::new(),
                anything: 0..0,
                counted: opened,
            };
        }
        if packet.hook == Hook::Xdp {
            return packet.untouched(Verdict::Next, opened);
        }
        let is_limited = why.fate() == Fate::Rejected && self.rejections >= REJECTIONS;
        let why = if is_limited { Why::RejectLimited } else { why };
        let counted = [&opened[..], &Vec::from_iter(why.label())].concat();
        let answer = match why.fate() {
            Fate::PassedOn => return packet.untouched(Verdict::Next, counted),
            Fate::Dropped => None,
            Fate::Rejected => answer(packet.frame, &packet.seen, why, &packet.outcome.frame),
        };
        match answer {
            Some(frame) => {
                Expected { verdict: Verdict::Redirect, frame: Some(frame), wrong: Vec::new(), anything: 0..0, counted }
            }
            None => packet.untouched(Verdict::Drop, counted),
        }
    }
}

type Sent = (Verdict, Translated);

/// The packet as it goes on. `port`: the source port that the backend sees.
fn send_on(packet: &Packet<'_>, flow: &Flow, choice: &Choice, direction: Direction, port: u16) -> Result<Sent, Why> {
    let Packet { seen, hook, from, frame, .. } = packet;
    let is_reply = direction == Direction::Reply;
    let dst = if is_reply { flow.request.src } else { choice.to.0 };
    if choice.masqueraded && seen.hop_limit <= 1 {
        return Err(Why::HopLimit);
    }
    let leaves = choice.masqueraded || !is_reply && *from == From::Host;
    let route = if leaves { Some(next_hop(*hook, frame, dst)?) } else { None };
    let to = if is_reply {
        let Ends { src, sport, dst, dport } = flow.request;
        Ends { src: dst, sport: dport, dst: src, dport: sport }
    } else {
        let masqueraded = choice.masqueraded;
        let own = route.filter(|_| masqueraded).map(|route| source(route.interface, seen.is_v4()).ok_or(Why::NoRoute));
        let src = own.transpose()?.unwrap_or(seen.ends.src);
        Ends { src, sport: port, dst, dport: choice.to.1 }
    };
    let ports = |ends: Ends| (ends.sport, ends.dport);
    if seen.protocol == SCTP && seen.piece != Piece::Whole && ports(to) != ports(seen.ends) {
        return Err(Why::Unsupported);
    }
    let mut new = translate(frame, seen, to);
    if choice.masqueraded {
        hop(&mut new, seen.is_v4());
    }
    if let Some(macs) = route.and_then(|route| net::macs(route, dst)) {
        new.frame[..12].copy_from_slice(&macs);
    }
    let reenters = *from == From::Pod && is_reply && !choice.masqueraded && to.src != seen.ends.src;
    if reenters {
        new.frame[..6].copy_from_slice(&MACS[..6]);
    }
    let verdict = if leaves || reenters { Verdict::Redirect } else { Verdict::Next };
    Ok((verdict, new))
}

fn next_hop(hook: Hook, frame: &[u8], dst: IpAddr) -> Result<&'static net::Route, Why> {
    let route = net::route(dst).ok_or(Why::NoRoute)?;
    let mtu = net::interface(route.interface).mtu;
    if frame.len() - LINK > usize::from(mtu) {
        return Err(Why::TooBig(mtu));
    }
    // In front of the stack only what goes out by the same interface, to a neighbour that is known.
    let is_simple = route.interface == net::UPLINK && net::macs(route, dst).is_some();
    if hook == Hook::Xdp && !is_simple { Err(Why::NoRoute) } else { Ok(route) }
}

/// Which of these it was.
fn one_of(expected: &[Expected], outcome: &Outcome) -> Result<Vec<usize>, String> {
    let matching: Vec<_> = (0..expected.len()).filter(|at| expected[*at].is(outcome)).collect();
    if !matching.is_empty() {
        return Ok(matching);
    }
    let mut text = String::new();
    for (at, expected) in expected.iter().take(3).enumerate() {
        text +=
            &format!("{} {:?}, {:?}", if at == 0 { "expected:" } else { "or:" }, expected.verdict, expected.counted);
        if let Some(frame) = &expected.frame {
            text += &format!("\n  {}", words::frame(frame));
            text += &words::differences(frame, &outcome.frame);
        }
        text += "\n";
    }
    let moved: Vec<_> = outcome.moved.keys().collect();
    Err(format!("{text}got: {:?}, {moved:?}\n  {}", outcome.verdict, words::frame(&outcome.frame)))
}
