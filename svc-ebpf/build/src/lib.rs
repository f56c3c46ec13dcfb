//! Compiles programs for the kernel, for the build scripts of those who carry them inside.
//!
//! It needs a compiler with core's sources (the bpf target has no ready-made core) and bpf-linker: `cargo xtask setup`
//! installs what is missing.
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use object::build::elf::{Builder, SectionData};
use object::elf::SHT_STRTAB;

struct Toolchain {
    cargo: Command,
    /// For a compiler that is not a nightly one, but takes its flags.
    bootstrap: bool,
}

/// Compiles the binary `bin` of `package`, which is in the workspace's directory `directory`, and writes it to `OUT_DIR/BIN.o`
/// without what only debuggers read. What fails becomes cargo's errors. For build scripts of members of `workspace` only.
///
/// # Panics
/// Where cargo's environment is not as it is for build scripts, and where files cannot be written.
pub fn compile(workspace: &Path, package: &str, directory: &str, bin: &str, features: &[&str]) {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    for input in [directory, "svc-ebpf", "svc-common", "Cargo.lock", "Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    // Shared by all profiles: TARGET/PROFILE/build/PACKAGE-HASH/out.
    let target = out.ancestors().nth(4).expect("cargo's layout").join("ebpf");
    let Some(mut toolchain) = find() else {
        println!(
            "cargo::error=no Rust toolchain with the standard library's sources was found for the kernel part: run `cargo xtask setup`"
        );
        return;
    };
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    let flags = [
        format!("--cfg=bpf_target_arch=\"{arch}\""),
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
        "-Ctarget-cpu=v3".into(),
    ];
    let cargo = &mut toolchain.cargo;
    cargo.current_dir(workspace).args([
        "build",
        "--locked",
        "--quiet",
        "--profile",
        "ebpf",
        "--package",
        package,
        "--bin",
        bin,
    ]);
    cargo
        .args(features.iter().flat_map(|feature| ["--features", feature]))
        .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core", "--target-dir"])
        .arg(&target);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")).env("PATH", search_path());
    for inherited in [
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "RUSTUP_TOOLCHAIN",
        "CLIPPY_ARGS",
    ] {
        cargo.env_remove(inherited);
    }
    if toolchain.bootstrap {
        cargo.env("RUSTC_BOOTSTRAP", "1").env("RUSTC", "/usr/bin/rustc");
    } else {
        cargo.env_remove("RUSTC");
    }
    match cargo.output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            for line in text.lines().filter(|line| !line.trim().is_empty()) {
                println!("cargo::error={line}");
            }
            println!("cargo::error=the kernel part did not build; `cargo xtask setup` installs what it needs");
            return;
        }
        Err(error) => {
            println!("cargo::error=the kernel part's cargo did not start: {error}");
            return;
        }
    }
    let object = std::fs::read(target.join("bpfel-unknown-none/ebpf").join(bin)).expect("the object was just built");
    std::fs::write(out.join(format!("{bin}.o")), without_dwarf(&object)).expect("cargo made the directory");
}

/// The object without what only debuggers read, three quarters of it. BTF stays: the verifier's log and the kernel's listings
/// have their names and lines from it.
fn without_dwarf(object: &[u8]) -> Vec<u8> {
    let mut builder = Builder::read(object).expect("the linker writes ELF");
    for section in &mut builder.sections {
        let name = &section.name[..];
        section.delete = name.starts_with(b".debug_") || name.starts_with(b".rel.debug_");
    }
    builder.delete_orphans();
    // LLVM keeps the sections' names among the symbols'; the builder wants a table for each.
    let names = builder.sections.add();
    names.name = b".shstrtab"[..].into();
    names.sh_type = SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut stripped).expect("writing to memory");
    stripped
}

/// A rustup nightly with core's sources, else the distribution's compiler with them.
fn find() -> Option<Toolchain> {
    if let Some(sysroot) = sysroot(Command::new("rustc").arg("+nightly").env_remove("RUSTUP_TOOLCHAIN"))
        && has_sources(&sysroot)
    {
        let mut cargo = Command::new("rustup");
        cargo.args(["run", "nightly", "cargo"]);
        return Some(Toolchain { cargo, bootstrap: false });
    }
    let sysroot = sysroot(&mut Command::new("/usr/bin/rustc"))?;
    has_sources(&sysroot).then(|| Toolchain { cargo: Command::new("/usr/bin/cargo"), bootstrap: true })
}

fn sysroot(rustc: &mut Command) -> Option<PathBuf> {
    let output = rustc.args(["--print", "sysroot"]).output().ok().filter(|output| output.status.success())?;
    Some(PathBuf::from(String::from_utf8(output.stdout).ok()?.trim()))
}

fn has_sources(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists()
}

/// bpf-linker stands where `cargo install` puts it, which not everybody has on the path.
fn search_path() -> std::ffi::OsString {
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let bin = cargo_home.or_else(|| env::home_dir().map(|home| home.join(".cargo"))).map(|home| home.join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    env::join_paths(env::split_paths(&path).chain(bin)).unwrap_or(path)
}
