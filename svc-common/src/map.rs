//! Keys and values of the kernel's maps. All are plain data: `repr(C)`, padding spelled out, no bool, no enum. Ports are in
//! network byte order (`port` as it stands in a packet, read natively), everything else in the machine's.
use crate::Addr;
use crate::flow::IdleLimits;
use crate::verifier::zeros;

/// File names of the pins under `--bpffs`, one a map; programs and links have their own directories there.
pub mod pin {
    pub const FRONTENDS: &str = "frontends";
    pub const BACKEND_SETS: &str = "backend_sets";
    pub const BACKENDS: &str = "backends";
    pub const ADDRESSES: &str = "addresses";
    pub const SERVICES: &str = "services";
    pub const UPLINKS: &str = "uplinks";
    pub const CONFIG: &str = "config";
    pub const FLOWS: &str = "flows";
    pub const SOCKETS: &str = "sockets";
    pub const COUNTERS: &str = "counters";
    pub const SOURCE_RANGES: &str = "source_ranges";
    pub const CIDRS: &str = "cidrs";
    pub const AFFINITY: &str = "affinity";
    pub const FRAGMENTS: &str = "fragments";
    pub const HOP_LEASE: &str = "hop_lease";
    /// One number: odd while the agent writes `frontends`, `addresses`, `cidrs` or `config`, even, and another one, when it has. What
    /// the kernel part has found to be no Service's it takes for such while the number stays. 0: nothing was written yet.
    pub const EPOCH: &str = "epoch";
    pub const MONITORS: &str = "monitors";
    pub const EVENTS: &str = "events";
    pub const EVENTS_TOLD: &str = "events_told";
    pub const CONNECTIONS: &str = "connections";
    pub const TRAFFIC: &str = "traffic";
}

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;

/// Where a client sends to: `frontends`' key. A NodePort stands under its family's wildcard address and holds for every
/// address of the node (`addresses`, [`ADDRESS_NODE`]) and, for the node's own sockets, for the loopback addresses.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FrontendKey {
    pub addr: Addr,
    /// Network byte order.
    pub port: u16,
    /// IANA protocol number.
    pub protocol: u8,
    pub pad: u8,
}
const _: () = assert!(size_of::<FrontendKey>() == 20);

impl FrontendKey {
    /// `port` in network byte order.
    #[inline(always)]
    pub const fn new(addr: Addr, port: u16, protocol: u8) -> Self {
        FrontendKey { addr, port, protocol, pad: 0 }
    }
}

/// `frontends`' value.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Frontend {
    /// The service port's id: key of `services`; its backend sets are [`cluster_set`] and [`local_set`].
    pub service: u32,
    /// `FRONTEND_*`.
    pub flags: u32,
    /// ClientIP session affinity's timeout; 0 where there is none.
    pub affinity_seconds: u32,
}
const _: () = assert!(size_of::<Frontend>() == 12);

/// The lowest two bits of [`Frontend::flags`] say what kind of address this is.
pub const FRONTEND_KIND: u32 = 0b11;
pub const FRONTEND_CLUSTER_IP: u32 = 0;
pub const FRONTEND_NODE_PORT: u32 = 1;
pub const FRONTEND_EXTERNAL_IP: u32 = 2;
pub const FRONTEND_LOAD_BALANCER: u32 = 3;
/// Clients in the cluster get local backends only (internalTrafficPolicy, KEP-2086).
pub const FRONTEND_INTERNAL_LOCAL: u32 = 1 << 2;
/// Clients outside get local backends only (externalTrafficPolicy).
pub const FRONTEND_EXTERNAL_LOCAL: u32 = 1 << 3;
/// Only sources in `source_ranges` are served, whoever they are; all others are dropped (loadBalancerSourceRanges).
pub const FRONTEND_SOURCE_RANGES: u32 = 1 << 4;

/// A service port's backends for clients that may use any of them: a key of `backend_sets`.
#[inline(always)]
pub const fn cluster_set(service: u32) -> u32 {
    service * 2
}

/// A service port's backends on this node: a key of `backend_sets`.
#[inline(always)]
pub const fn local_set(service: u32) -> u32 {
    service * 2 + 1
}

/// An entry of a backend set's inner array. Entry 0 is the header, of which only `id` means something: how many backends
/// follow it, in the order of their ids. A set is swapped as a whole, so a reader sees the old one or the new one.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct BackendSlot {
    pub addr: Addr,
    /// Network byte order.
    pub port: u16,
    /// `BACKEND_*`.
    pub flags: u16,
    /// The backend's id (index of `backends`), or in the header the set's size.
    pub id: u32,
}
const _: () = assert!(size_of::<BackendSlot>() == 24);

/// The backend is on this node.
pub const BACKEND_LOCAL: u16 = 1;

impl BackendSlot {
    /// None, to be written over.
    #[inline(always)]
    pub fn blank() -> Self {
        BackendSlot { addr: Addr::from_pairs(zeros()), port: 0, flags: 0, id: 0 }
    }

    pub const fn header(count: u32) -> Self {
        BackendSlot { addr: Addr::ANY_V6, port: 0, flags: 0, id: count }
    }
}

/// `backends`' value, by backend id: which endpoint has this id, and whether its service's sets hold it. An id names one
/// address, port and protocol of one service for as long as it lives, and is given out again as late as possible, since
/// flows remember it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Backend {
    pub addr: Addr,
    /// Network byte order.
    pub port: u16,
    pub protocol: u8,
    /// 1 while a set holds this backend; 0: new connections and UDP datagrams must choose another.
    pub live: u8,
    /// The service's id.
    pub service: u32,
}
const _: () = assert!(size_of::<Backend>() == 24);

/// Backend ids have 24 bits in a flow's cell.
pub const MAX_BACKEND_ID: u32 = (1 << 24) - 1;
/// The backend id of a flow that is no Service's.
pub const NO_BACKEND: u32 = 0;

/// `addresses`' value: what an address is to this node, a bit set of `ADDRESS_*`.
pub type AddressFlags = u32;
/// An address of this node on which NodePorts answer.
pub const ADDRESS_NODE: AddressFlags = 1;
/// A ClusterIP: ports that no Service has are rejected, as kube-proxy does, so that nothing loops.
pub const ADDRESS_CLUSTER_IP: AddressFlags = 2;
/// An external IP or load balancer address of a Service.
pub const ADDRESS_EXTERNAL: AddressFlags = 4;
/// An address of this node, whether NodePorts answer on it or not.
pub const ADDRESS_LOCAL: AddressFlags = 8;

/// `source_ranges`' key, of a longest-prefix-match trie: the sources that a frontend with [`FRONTEND_SOURCE_RANGES`]
/// admits. The value is 1.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SourceRangeKey {
    /// In bits, `service`'s 32 included; an IPv4 prefix counts the 96 bits before it ([`Addr`]).
    pub prefix_len: u32,
    pub service: u32,
    pub addr: Addr,
}
const _: () = assert!(size_of::<SourceRangeKey>() == 24);

impl SourceRangeKey {
    /// `len`: bits of the address, an IPv4 one being v4-mapped: 96 and more. 128 for a look-up.
    #[inline(always)]
    pub const fn new(service: u32, addr: Addr, len: u32) -> Self {
        SourceRangeKey { prefix_len: 32 + len, service, addr }
    }
}

/// `cidrs`' key, of a longest-prefix-match trie.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct CidrKey {
    /// In bits; an IPv4 prefix counts the 96 bits before it ([`Addr`]). 128 for a look-up.
    pub prefix_len: u32,
    pub addr: Addr,
}
const _: () = assert!(size_of::<CidrKey>() == 20);

/// How many ranges `cidrs` has room for.
pub const MAX_CIDRS: usize = 1024;

/// `cidrs`' value: what an address in this range is, a bit set of `CIDR_*`. A range inside another has the other's bits too.
pub type CidrFlags = u32;
/// A pod, as kube-proxy's detectLocalMode tells one: its traffic is the cluster's own, wherever it comes in.
pub const CIDR_PODS: CidrFlags = 1;
/// A ClusterIP, or free to be one: what no Service has is dropped (ServiceCIDR, KEP-1880).
pub const CIDR_SERVICES: CidrFlags = 2;

/// `affinity`'s key: a client of a service port that has ClientIP session affinity.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AffinityKey {
    pub service: u32,
    pub pad: u32,
    /// Its address, or for a socket of this node [`Addr::of_netns`].
    pub client: Addr,
}
const _: () = assert!(size_of::<AffinityKey>() == 24);

/// `affinity`'s value.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Affinity {
    /// The backend's id.
    pub backend: u32,
    /// Of its last new connection, in seconds of CLOCK_MONOTONIC.
    pub last: u32,
}
const _: () = assert!(size_of::<Affinity>() == 8);

/// `fragments`' key: an IP datagram that comes in pieces (RFC 791, RFC 8200 4.5).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FragmentKey {
    pub src: Addr,
    pub dst: Addr,
    /// As it stands in the packet.
    pub id: u32,
    pub protocol: u8,
    pub pad: [u8; 3],
}
const _: () = assert!(size_of::<FragmentKey>() == 40);

/// `fragments`' value: the ports, which only the first piece has, in network byte order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct FragmentPorts {
    pub sport: u16,
    pub dport: u16,
}
const _: () = assert!(size_of::<FragmentPorts>() == 4);

/// `services`' value, by service id: names, padded with zeros, so that inspection works and a restarted agent keeps its ids.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ServiceName {
    pub namespace: [u8; MAX_NAME],
    pub name: [u8; MAX_NAME],
    /// The Service port's name; empty where it has none.
    pub port_name: [u8; MAX_NAME],
    /// The IANA protocol number, and [`SERVICE_V6`].
    pub kind: u8,
    /// The Service port's own number, host byte order.
    pub port: u16,
}
/// With four bytes more the kernel would take 512 for an entry instead of 256.
const _: () = assert!(size_of::<ServiceName>() == 192);

impl ServiceName {
    /// The IANA number.
    pub const fn protocol(&self) -> u8 {
        self.kind & !SERVICE_V6
    }
}

/// Bytes of a name: a label's (RFC 1123, RFC 1035 2.3.4).
pub const MAX_NAME: usize = 63;
/// The backends are IPv6's: a dual-stack Service port is two service ids, since a frontend's backends are of its own family.
pub const SERVICE_V6: u8 = 1 << 3;
const _: () = assert!((TCP | UDP | SCTP) & SERVICE_V6 == 0);

/// `uplinks`' value, by interface index: the addresses that forwarded traffic takes as its source on this interface;
/// the unspecified address where the interface has none of that family. Index 0 holds the node's own, for those.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Uplink {
    pub v4: Addr,
    pub v6: Addr,
}
const _: () = assert!(size_of::<Uplink>() == 32);

/// `config`'s only value.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Config {
    /// The network namespace of the node (SO_NETNS_COOKIE): only its sockets mean the node by a loopback address.
    pub host_netns: u64,
    /// Secret of the flow table's hash; as old as the table.
    pub flow_seed: u64,
    /// Number of sets of the flow table, a power of two.
    pub flow_sets: u32,
    /// Source ports for forwarded traffic, first and last, host byte order; no socket of the node uses one of them.
    pub snat_first: u16,
    pub snat_last: u16,
    /// `CONFIG_*`.
    pub flags: u32,
    /// The interface by which replies come back to the node's own connections that a socket hook did not see; 0: none.
    pub uplink: u32,
    /// That interface's link address, as it stands in a packet.
    pub uplink_mac: [u16; 3],
    pub pad: u16,
    pub idle_limits: IdleLimits,
}
const _: () = assert!(size_of::<Config>() == 72);

impl Config {
    /// The first of the source ports that stand for a client's own where its address stays. Those below, seven eighths of
    /// all, go with this node's address. Both are apart since every node gives out ports, and what one has
    /// given to its own address another may have to move.
    #[inline(always)]
    pub const fn first_moved_port(&self) -> u16 {
        self.snat_last - (self.snat_last - self.snat_first) / 8
    }
}

/// How long next hops may be kept, and since when: the agent gives it and takes it back as it hears of changes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct HopLease {
    /// CLOCK_MONOTONIC in nanoseconds; from then on each packet's way is asked for.
    pub until: u64,
    /// What was learned under another number is out of date. Never 0 while there is a lease.
    pub generation: u32,
    pub pad: u32,
}
const _: () = assert!(size_of::<HopLease>() == 16);

/// Every connection to a ClusterIP takes an address of this node as its source (kube-proxy's masqueradeAll).
pub const CONFIG_MASQUERADE_ALL: u32 = 1;
/// `cidrs` tells which IPv4 sources are pods: an IPv4 ClusterIP's other clients are masqueraded.
pub const CONFIG_DETECT_PODS_V4: u32 = 1 << 1;
/// Only the node's own sockets are pointed at backends; pods' traffic is translated packet by packet.
pub const CONFIG_HOST_SOCKETS_ONLY: u32 = 1 << 2;
/// [`CONFIG_DETECT_PODS_V4`] for IPv6.
pub const CONFIG_DETECT_PODS_V6: u32 = 1 << 3;

/// Only a connection's first packet opens a flow: what is under way already is somebody else's, who translates it.
pub const CONFIG_TAKE_OVER: u32 = 1 << 4;

/// What goes to each backend and comes from it is counted (`traffic`).
pub const CONFIG_COUNT_BYTES: u32 = 1 << 5;

/// `sockets`' key: what a socket hook must remember of a socket.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SocketKey {
    pub cookie: u64,
    pub addr: Addr,
    /// Network byte order.
    pub port: u16,
    pub protocol: u8,
    /// [`SOCKET_REVERSE`] or [`SOCKET_STICKY`].
    pub kind: u8,
    pub pad: u32,
}
const _: () = assert!(size_of::<SocketKey>() == 32);

/// The key's address is a backend's, the value's the frontend that it was asked for as.
pub const SOCKET_REVERSE: u8 = 0;
/// The key's address is a frontend's, the value's the backend that this unconnected UDP socket stays with.
pub const SOCKET_STICKY: u8 = 1;

/// `sockets`' value.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SocketPeer {
    pub addr: Addr,
    /// Network byte order.
    pub port: u16,
    pub pad: u16,
    /// The backend's id.
    pub backend: u32,
}
const _: () = assert!(size_of::<SocketPeer>() == 24);

/// `counters`' value, per CPU, indexed by [`crate::Reason`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counter {
    pub packets: u64,
    pub bytes: u64,
}
const _: () = assert!(size_of::<Counter>() == 16);

/// `traffic`'s value, per CPU, indexed by backend id: what the translated packets' sizes come to, link headers included. Packets
/// of sockets that a hook has pointed at their backend are not translated, and not in it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Traffic {
    pub to_backend: u64,
    pub from_backend: u64,
}
const _: () = assert!(size_of::<Traffic>() == 16);

/// How many of `svc-agent monitor` may be open at a time.
pub const MAX_MONITORS: usize = 4;
/// Bytes of one monitor's ring buffer: 10,000 events.
pub const EVENTS_SIZE: usize = 1 << 20;

/// `monitors`' value: what one monitor wants to be told. It is all zeros where there is none.
///
/// A monitor that dies has no chance to take itself away, so that it holds for a short time only and is renewed.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Monitor {
    /// In nanoseconds of CLOCK_MONOTONIC.
    pub until: u64,
    /// A bit for each [`crate::Reason`], by its discriminant.
    pub reasons: u32,
    pub pad: u32,
}
const _: () = assert!(size_of::<Monitor>() == 16);

/// `events_told`'s value, per CPU and monitor.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Told {
    /// The time that `told` counts in, a tick of 2^27 ns.
    pub tick: u32,
    pub told: u32,
    /// Events that the monitor was not told of: more than the bound, or than its ring buffer has room for.
    pub lost: u64,
}
const _: () = assert!(size_of::<Told>() == 16);

/// What a monitor is told. Addresses and ports are those of the packet as it was met, ports in network byte order; of a socket
/// only the destination is known.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Event {
    /// In nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// Of a socket: its network namespace (SO_NETNS_COOKIE). 0 for a packet.
    pub netns: u64,
    pub src: Addr,
    pub dst: Addr,
    /// Of a new flow: the backend's address. So for the two below.
    pub to: Addr,
    pub to_port: u16,
    /// The source port that the backend sees.
    pub second_port: u16,
    pub src_port: u16,
    pub dst_port: u16,
    /// Of the backend; 0 where there is none.
    pub backend: u32,
    /// The discriminant of a [`crate::Reason`].
    pub reason: u32,
    /// The interface that the packet was met at; 0 for a socket.
    pub interface: u32,
    /// The packet's size, link header included.
    pub bytes: u32,
    pub protocol: u8,
    /// `EVENT_FROM_*`.
    pub from: u8,
    /// 1 where the source address becomes this node's.
    pub masqueraded: u8,
    pub pad: [u8; 5],
}
const _: () = assert!(size_of::<Event>() == 96);

/// A packet that came in from the network.
pub const EVENT_FROM_NETWORK: u8 = 0;
/// A packet of a pod of this node.
pub const EVENT_FROM_POD: u8 = 1;
/// A packet of this node's own, about to leave.
pub const EVENT_FROM_HOST: u8 = 2;
/// A socket, before it has sent anything.
pub const EVENT_FROM_SOCKET: u8 = 3;
