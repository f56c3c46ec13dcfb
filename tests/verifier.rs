//! What the kernel's verifier has to do for each program, and how much room that leaves: a program that is only just accepted
//! is refused by the next kernel, or with the next change.
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use aya::programs::Program;
use aya::{Ebpf, EbpfLoader};
use svc_agent::dataplane::aya::OBJECT;

/// What the verifier takes (BPF_COMPLEXITY_LIMIT_INSNS).
const LIMIT: u32 = 1_000_000;
/// Of 512 bytes in all (MAX_BPF_STACK).
const MAX_STACK: usize = 480;

#[test]
fn every_program_is_verified_with_room_to_spare() {
    let mut ebpf = load();
    for (name, program) in ebpf.programs_mut() {
        load_program(name, program);
    }
    let symbols = Symbols::read();
    let allowed = allowed();
    let mut faults = Vec::new();
    for (name, program) in ebpf.programs() {
        let info = program.info().unwrap();
        let verified = info.verified_instruction_count().expect("Linux 5.16 counts them");
        let stack = Code::of(program.fd().unwrap().as_fd(), &symbols).deepest();
        println!("{name:<18} {verified:>7} instructions verified, {stack}");
        if verified > allowed {
            faults.push(format!("{name}: {verified} instructions verified, {allowed} allowed"));
        }
        if stack.bytes > MAX_STACK {
            faults.push(format!("{name}: {stack}, {MAX_STACK} bytes allowed"));
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

/// Half of the limit. On Linux before 6.6, whose verifier sees less often that it has been in a state before, three quarters: it
/// gets fixes only, so that room is needed for our own changes alone.
fn allowed() -> u32 {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    if (numbers.next(), numbers.next()) < (Some(6), Some(6)) { LIMIT / 4 * 3 } else { LIMIT / 2 }
}

/// A debug build's: see kernel-log in Cargo.toml.
#[cfg(feature = "kernel-log")]
#[test]
fn a_packet_that_is_not_followed_is_logged_with_its_reason() {
    use std::sync::Mutex;

    use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};

    #[derive(Default)]
    struct Lines(Mutex<Vec<String>>);

    impl log::Log for Lines {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &log::Record<'_>) {
            self.0.lock().unwrap().push(record.args().to_string());
        }

        fn flush(&self) {}
    }

    let mut ebpf = load();
    let lines = Lines::default();
    let mut logger = aya_log::EbpfLogger::init_with_logger(&mut ebpf, &lines).unwrap();
    let program: &mut SchedClassifier = ebpf.program_mut("svc_ingress").unwrap().try_into().unwrap();
    program.load().unwrap();
    // IPv4 and TCP, of which four bytes are there.
    let mut packet = [0; 38];
    packet[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
    packet[17] = 24;
    packet[23] = 6;
    program.test_run(TestRunOptions { data_in: Some(&packet), ..TestRunOptions::default() }).unwrap();
    logger.flush();
    assert_eq!(*lines.0.lock().unwrap(), ["truncated (38 bytes)"]);
}

fn load() -> Ebpf {
    EbpfLoader::new().btf(None).load(OBJECT).unwrap()
}

fn load_program(name: &str, program: &mut Program) {
    let result = match program {
        Program::Xdp(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        other => panic!("{name} is of an unknown type, {:?}", other.prog_type()),
    };
    result.unwrap_or_else(|error| panic!("{name}: {error}"));
}

/// A chain of calls and the stack that it takes.
struct Chain {
    bytes: usize,
    functions: Vec<String>,
}

impl std::fmt::Display for Chain {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} bytes of stack in {}", self.bytes, self.functions.join(" > "))
    }
}

/// A loaded program's instructions, as the kernel translated them.
struct Code {
    instructions: Vec<[u8; 8]>,
    /// The first instruction of each function.
    starts: Vec<usize>,
    names: Vec<String>,
}

const FRAME_POINTER: u8 = 10;

impl Code {
    fn of(program: BorrowedFd<'_>, names: &Symbols) -> Self {
        let sizes = ProgramInfo::of(program, ProgramInfo::default());
        let mut instructions = vec![[0u8; 8]; sizes.translated_length as usize / 8];
        let mut functions = vec![[0u32; 2]; sizes.functions as usize];
        let mut symbols = vec![0u64; sizes.symbols as usize];
        ProgramInfo::of(
            program,
            ProgramInfo {
                translated_length: sizes.translated_length,
                translated: instructions.as_mut_ptr() as u64,
                function_size: size_of::<[u32; 2]>() as u32,
                functions: sizes.functions,
                function_table: functions.as_mut_ptr() as u64,
                symbols: sizes.symbols,
                symbol_table: symbols.as_mut_ptr() as u64,
                ..ProgramInfo::default()
            },
        );
        let starts = functions.iter().map(|[start, _]| *start as usize).collect();
        Code { instructions, starts, names: names.at(&symbols) }
    }

    /// The chain of calls that takes most stack. Each frame counts as a multiple of 32 bytes, as older kernels round it; from
    /// Linux 6.8 on it is 16.
    fn deepest(&self) -> Chain {
        self.deepest_from(0)
    }

    fn deepest_from(&self, function: usize) -> Chain {
        let end = self.starts.get(function + 1).copied().unwrap_or(self.instructions.len());
        let body = &self.instructions[self.starts[function]..end];
        let below = calls(body).map(|callee| self.deepest_from(callee)).max_by_key(|chain| chain.bytes);
        let mut chain = below.unwrap_or(Chain { bytes: 0, functions: Vec::new() });
        let bytes = frame(body).max(1).next_multiple_of(32);
        chain.bytes += bytes;
        chain.functions.insert(0, format!("{} {bytes}", self.names[function]));
        chain
    }
}

/// The functions called, by number: the kernel has put that in the place of the distance.
fn calls(body: &[[u8; 8]]) -> impl Iterator<Item = usize> {
    const CALL: u8 = 0x85;
    const PSEUDO_CALL: u8 = 1;
    let calls = body.iter().filter(|[code, registers, ..]| *code == CALL && registers >> 4 == PSEUDO_CALL);
    calls.map(|instruction| immediate(instruction) as usize)
}

/// How far below the frame pointer a function reaches, in bytes.
fn frame(body: &[[u8; 8]]) -> usize {
    const LOAD: u8 = 1;
    const STORE: [u8; 2] = [2, 3];
    const ALU: [u8; 2] = [4, 7];
    const MOVE_64: u8 = 0xbf;
    const ADD_64: u8 = 0x07;
    // Distances from the frame pointer of the registers that are known to point into the frame.
    let mut pointers: BTreeMap<u8, i32> = BTreeMap::from([(FRAME_POINTER, 0)]);
    let mut lowest = 0;
    for instruction in body {
        let [code, registers, low, high, ..] = *instruction;
        let (destination, source, class) = (registers & 15, registers >> 4, code & 7);
        let offset = i32::from(i16::from_le_bytes([low, high]));
        let base = match class {
            LOAD => Some(source),
            class if STORE.contains(&class) => Some(destination),
            _ => None,
        };
        if let Some(pointer) = base.and_then(|base| pointers.get(&base)) {
            lowest = lowest.min(pointer + offset);
        }
        let value = match (code, pointers.get(&destination), pointers.get(&source)) {
            (MOVE_64, _, Some(pointer)) => Some(*pointer),
            (ADD_64, Some(pointer), _) => Some(pointer + immediate(instruction)),
            _ => None,
        };
        if let Some(pointer) = value {
            lowest = lowest.min(pointer);
            pointers.insert(destination, pointer);
        } else if class == LOAD || ALU.contains(&class) {
            pointers.remove(&destination);
        }
    }
    lowest.unsigned_abs() as usize
}

fn immediate(instruction: &[u8; 8]) -> i32 {
    let [.., a, b, c, d] = *instruction;
    i32::from_le_bytes([a, b, c, d])
}

/// The names of functions of loaded programs, by address. The kernel takes seconds to write them all down where it is emulated.
struct Symbols(BTreeMap<u64, String>);

impl Symbols {
    fn read() -> Self {
        let table = fs::read_to_string("/proc/kallsyms").unwrap();
        let symbols = table.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            // bpf_prog_TAG_NAME, with < as _3C.
            let name = words.nth(1)?.strip_prefix("bpf_prog_")?.split_once('_')?.1;
            // What follows are the types that it was made for.
            Some((address, name.split("_3C").next()?.to_owned()))
        });
        Symbols(symbols.collect())
    }

    fn at(&self, addresses: &[u64]) -> Vec<String> {
        addresses.iter().map(|address| self.0.get(address).map_or("?", String::as_str).to_owned()).collect()
    }
}

/// struct bpf_prog_info of linux/bpf.h, as far as it is asked for.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ProgramInfo {
    head: [u32; 4],
    native_length: u32,
    translated_length: u32,
    native: u64,
    translated: u64,
    load_time: u64,
    user: u32,
    maps: u32,
    map_table: u64,
    name: [u64; 2],
    interface: u32,
    flags: u32,
    namespace: [u64; 2],
    symbols: u32,
    function_lengths: u32,
    symbol_table: u64,
    function_length_table: u64,
    btf: u32,
    function_size: u32,
    function_table: u64,
    functions: u32,
    lines: u32,
}

impl ProgramInfo {
    /// What the kernel says of the program, and to where `wanted` points.
    fn of(program: BorrowedFd<'_>, mut wanted: ProgramInfo) -> Self {
        const OBJ_GET_INFO_BY_FD: i64 = 15;
        let mut attributes = (program.as_raw_fd(), size_of_val(&wanted) as u32, (&raw mut wanted) as u64);
        // SAFETY: the attributes are laid out as the command wants them, and the buffers outlive the call.
        let result = unsafe { libc::syscall(libc::SYS_bpf, OBJ_GET_INFO_BY_FD, &raw mut attributes, 16usize) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        wanted
    }
}
