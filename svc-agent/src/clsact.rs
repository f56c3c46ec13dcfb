//! Programs at an interface's two sides where the kernel has no tcx: the clsact qdisc, on it a filter of kind bpf each way,
//! in direct-action mode. A filter is told from other people's by its number, and is there until it is removed.
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption,
};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// Before those filters that tc numbers by itself, which it does from 49152 downwards.
const PRIORITY: u16 = 1000;
/// The upper half of our filters' handles: "sv", which nothing is numbered by itself.
const OWN: u16 = 0x7376;
const KIND: &str = "clsact";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Ingress,
    Egress,
}

impl Side {
    const BOTH: [Side; 2] = [Side::Ingress, Side::Egress];

    fn parent(self) -> TcHandle {
        let minor = match self {
            Side::Ingress => TcHandle::MIN_INGRESS,
            Side::Egress => TcHandle::MIN_EGRESS,
        };
        TcHandle { major: TcHandle::CLSACT.major, minor }
    }
}

/// Of the calling thread's network namespace.
pub struct Clsact {
    socket: Socket,
}

impl Clsact {
    /// # Errors
    /// Where there is no netlink socket to be had.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Clsact { socket })
    }

    /// False where it is there already.
    ///
    /// # Errors
    /// What the kernel says; EEXIST where a qdisc of another kind has its place.
    pub fn add_qdisc(&self, interface: u32) -> io::Result<bool> {
        let message = Message::NewQueueDiscipline(qdisc(interface));
        match self.ask(message, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                if self.has_qdisc(interface)? {
                    Ok(false)
                } else {
                    Err(error)
                }
            }
            result => result.map(|_| true),
        }
    }

    /// # Errors
    /// What the kernel says.
    fn has_qdisc(&self, interface: u32) -> io::Result<bool> {
        let answers = self.ask(Message::GetQueueDiscipline(message(interface)), NLM_F_DUMP)?;
        Ok(answers.iter().any(|answer| {
            matches!(answer, Message::NewQueueDiscipline(qdisc)
                if qdisc.header.index == interface.cast_signed() && is_of_kind(qdisc, KIND))
        }))
    }

    /// With every filter on it. Where there is none that succeeds.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove_qdisc(&self, interface: u32) -> io::Result<()> {
        absent_is_fine(self.ask(Message::DelQueueDiscipline(qdisc(interface)), NLM_F_ACK))
    }

    /// Puts the program there, in one step in the place of the one before.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn put(&self, interface: u32, side: Side, number: u16, name: &str, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut filter = filter(interface, side, number);
        filter.attributes = vec![
            TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
            TcAttribute::Options(vec![
                TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd().cast_unsigned())),
                TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned())),
                TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
            ]),
        ];
        self.ask(Message::NewTrafficFilter(filter), NLM_F_ACK | NLM_F_CREATE).map(drop)
    }

    /// Where there is none that succeeds.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove(&self, interface: u32, side: Side, number: u16) -> io::Result<()> {
        absent_is_fine(self.ask(Message::DelTrafficFilter(filter(interface, side, number)), NLM_F_ACK))
    }

    /// The id of the program that was put there; none where none is.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn program(&self, interface: u32, side: Side, number: u16) -> io::Result<Option<u32>> {
        let filters = self.filters(interface, side)?;
        let own = filters
            .iter()
            .find(|filter| filter.header.handle == handle(number) && filter.header.info >> 16 == u32::from(PRIORITY));
        Ok(own.and_then(|filter| {
            filter.attributes.iter().find_map(|attribute| match attribute {
                TcAttribute::Options(options) => options.iter().find_map(|option| match option {
                    TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
                    _ => None,
                }),
                _ => None,
            })
        }))
    }

    /// Whether nobody has a filter on the interface's qdisc.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn is_unused(&self, interface: u32) -> io::Result<bool> {
        for side in Side::BOTH {
            if !self.filters(interface, side)?.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn filters(&self, interface: u32, side: Side) -> io::Result<Vec<TcMessage>> {
        let mut request = message(interface);
        request.header.parent = side.parent();
        let answers = match self.ask(Message::GetTrafficFilter(request), NLM_F_DUMP) {
            // The interface has gone.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Vec::new(),
            answers => answers?,
        };
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                Message::NewTrafficFilter(filter) => Some(filter),
                _ => None,
            })
            .collect())
    }

    /// Sends a request, and reads all that answers it.
    fn ask(&self, message: Message, flags: u16) -> io::Result<Vec<Message>> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let (received, _) = self.socket.recv_from_full()?;
            let mut rest = received.as_slice();
            while rest.len() >= 16 {
                let answer = NetlinkMessage::<Message>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                let length = (answer.header.length as usize).next_multiple_of(4).clamp(16, rest.len());
                rest = &rest[length..];
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    // An acknowledgement is an error without a code.
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    _ => {}
                }
            }
        }
    }
}

fn message(interface: u32) -> TcMessage {
    TcMessage::with_index(interface.cast_signed())
}

fn qdisc(interface: u32) -> TcMessage {
    let handle = TcHandle { minor: 0, ..TcHandle::CLSACT };
    let index = interface.cast_signed();
    let header = TcHeader { index, handle, parent: TcHandle::CLSACT, ..TcHeader::default() };
    TcMessage::from_parts(header, vec![TcAttribute::Kind(KIND.to_owned())])
}

fn filter(interface: u32, side: Side, number: u16) -> TcMessage {
    let info = u32::from(PRIORITY) << 16 | u32::from((libc::ETH_P_ALL as u16).to_be());
    let index = interface.cast_signed();
    let header = TcHeader { index, handle: handle(number), parent: side.parent(), info, ..TcHeader::default() };
    TcMessage::from_parts(header, Vec::new())
}

fn handle(number: u16) -> TcHandle {
    TcHandle { major: OWN, minor: number }
}

fn is_of_kind(message: &TcMessage, wanted: &str) -> bool {
    message.attributes.iter().any(|attribute| matches!(attribute, TcAttribute::Kind(kind) if kind == wanted))
}

fn absent_is_fine(result: io::Result<Vec<Message>>) -> io::Result<()> {
    /// No such filter; no qdisc that one could be on; no such interface.
    const ABSENT: [i32; 3] = [libc::ENOENT, libc::EINVAL, libc::ENODEV];
    match result {
        Err(error) if ABSENT.contains(&error.raw_os_error().unwrap_or(0)) => Ok(()),
        result => result.map(drop),
    }
}
