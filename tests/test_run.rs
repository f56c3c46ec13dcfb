//! A program of the kernel part, run on one packet by the kernel itself (BPF_PROG_TEST_RUN).
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// The call bpf(2). `attr` is laid out as `command` wants it.
///
/// # Errors
/// What the kernel says.
pub fn bpf<T>(command: i64, attr: &mut T) -> io::Result<i64> {
    // SAFETY: the attributes are laid out as the command wants them, and their buffers outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// What the packet comes with.
#[derive(Clone, Copy, Default, Debug)]
pub struct Context {
    /// The program is of type XDP, else of tc's.
    pub xdp: bool,
    /// The index of an interface of the caller's network namespace.
    pub interface: u32,
    /// Of a packet that stands for several (GSO): how many, and the payload of each in bytes; 0 for none.
    pub segments: u32,
    pub segment_size: u32,
    /// How often the program runs, each time on what the last run has left of the packet; 0 is once.
    pub repeat: u32,
}

/// What came of it.
pub struct Ran {
    pub verdict: u32,
    /// The packet as it is afterwards.
    pub packet: Vec<u8>,
    /// For each time, on average.
    pub nanoseconds: u32,
}

/// The part of union bpf_attr that is BPF_PROG_TEST_RUN's.
#[repr(C)]
#[derive(Default)]
struct Attr {
    program: u32,
    verdict: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    pad: u32,
}

const PROG_TEST_RUN: i64 = 10;

/// # Errors
/// What the kernel says.
pub fn run(program: BorrowedFd<'_>, context: Context, packet: &[u8]) -> io::Result<Ran> {
    // A piece of a datagram may come out as one that waited for it, of up to 9216 bytes.
    let mut output = vec![0u8; packet.len().max(9216) + 256];
    let mut words = [0u32; 48];
    let context_size = if context.xdp {
        // struct xdp_md: data_end, ingress_ifindex.
        words[1] = packet.len() as u32;
        words[3] = context.interface;
        24
    } else {
        // struct __sk_buff: ifindex, gso_segs, gso_size.
        words[10] = context.interface;
        words[41] = context.segments;
        words[44] = context.segment_size;
        192
    };
    let mut attr = Attr {
        program: program.as_raw_fd() as u32,
        size_in: packet.len() as u32,
        size_out: output.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_out: output.as_mut_ptr() as u64,
        repeat: context.repeat,
        context_size_in: context_size,
        context_in: words.as_ptr() as u64,
        ..Attr::default()
    };
    bpf(PROG_TEST_RUN, &mut attr)?;
    output.truncate(attr.size_out as usize);
    Ok(Ran { verdict: attr.verdict, packet: output, nanoseconds: attr.duration })
}

/// Frames that are sent on as an XDP program says (BPF_F_TEST_XDP_LIVE_FRAMES), `batch` of them together.
///
/// # Errors
/// What the kernel says.
pub fn run_live(program: BorrowedFd<'_>, frame: &[u8], frames: u32, batch: u32) -> io::Result<()> {
    const LIVE_FRAMES: u32 = 1 << 1;
    let mut attr = Attr {
        program: program.as_raw_fd() as u32,
        size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        repeat: frames,
        flags: LIVE_FRAMES,
        batch,
        ..Attr::default()
    };
    bpf(PROG_TEST_RUN, &mut attr).map(drop)
}
