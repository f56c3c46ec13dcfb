//! Container images, written as `docker save` writes them.
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use ring::digest::{Context as Digest, SHA256};
use serde_json::json;
use svc_lab::control_plane::{kube_proxy_binary, kubernetes_version};
use svc_lab::{binaries, go};

use crate::programs::{Programs, USERLAND, source};
use crate::proxy::Proxy;
use crate::step::step;

pub(crate) const PAUSE: &str = "svc.test/pause:dev";
pub(crate) const COREDNS: &str = "svc.test/coredns:dev";
/// Of the project's own HTTP servers and clients, with a shell.
pub(crate) const LAB: &str = "svc.test/lab:dev";
/// As deploy/kind has it, and as the other parts of deploy/ have it.
const AGENT: [&str; 2] = ["docker.io/library/svc-agent:dev", "docker.io/library/svc-agent:0.1.0"];

const USERLAND_PACKAGES: &str = "bind9-dnsutils,busybox,curl,iperf,iproute2,iptables,netcat-openbsd,nftables,wget";
/// What the tests call and Debian's image has not. Not wget, which Debian's busybox crashes in: GNU's, told to try once
/// as busybox does.
const USERLAND_HOOKS: [&str; 3] = [
    r#"for name in ping ps netstat ifconfig route telnet traceroute nslookup vi top killall arping; do
        chroot "$1" sh -c "command -v $name" >/dev/null || ln -s /bin/busybox "$1/usr/local/bin/$name"; done"#,
    r#"echo "tries = 1" >> "$1/etc/wgetrc""#,
    r#"echo "user-defined-in-image:x:1000:1000::/:/bin/sh" >> "$1/etc/passwd"
        printf "user-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n" >> "$1/etc/group""#,
];

struct Image<'a> {
    names: Vec<String>,
    entrypoint: &'a [&'a str],
    arguments: &'a [&'a str],
    /// Tar archives.
    layers: Vec<PathBuf>,
}

impl Image<'_> {
    fn write(&self, target: &Path) -> Result<()> {
        let digests = self.layers.iter().map(|layer| digest(File::open(layer)?)).collect::<Result<Vec<_>>>()?;
        let configuration = json!({
            "architecture": architecture()?, "os": "linux", "created": "1970-01-01T00:00:00Z",
            "config": {
                "Entrypoint": self.entrypoint, "Cmd": self.arguments, "WorkingDir": "/",
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            },
            "rootfs": { "type": "layers", "diff_ids": digests.iter().map(|digest| format!("sha256:{digest}")).collect::<Vec<_>>() },
        })
        .to_string();
        let name = format!("{}.json", digest(configuration.as_bytes())?);
        let files: Vec<_> = digests.iter().map(|digest| format!("{digest}/layer.tar")).collect();
        let manifest = json!([{ "Config": name, "RepoTags": self.names, "Layers": files }]).to_string();

        whole(target, |file| {
            let mut archive = tar::Builder::new(file);
            append(&mut archive, "manifest.json", 0o644, manifest.as_bytes(), manifest.len() as u64)?;
            append(&mut archive, &name, 0o644, configuration.as_bytes(), configuration.len() as u64)?;
            for (layer, name) in self.layers.iter().zip(&files) {
                let file = File::open(layer)?;
                append(&mut archive, name, 0o644, &file, file.metadata()?.len())?;
            }
            Ok(archive.finish()?)
        })
    }
}

/// Under its name only when it is whole.
fn whole(target: &Path, write: impl FnOnce(File) -> Result<()>) -> Result<()> {
    let unfinished = target.with_extension(format!("{}", std::process::id()));
    write(File::create(&unfinished).with_context(|| format!("cannot create {}", unfinished.display()))?)?;
    fs::rename(unfinished, target)?;
    Ok(())
}

fn append(archive: &mut tar::Builder<File>, name: &str, mode: u32, data: impl Read, size: u64) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(mode);
    Ok(archive.append_data(&mut header, name, data)?)
}

/// In hexadecimal.
fn digest(mut data: impl Read) -> Result<String> {
    struct Hash(Digest);
    impl Write for Hash {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut hash = Hash(Digest::new(&SHA256));
    io::copy(&mut data, &mut hash)?;
    Ok(hash.0.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// As images name it.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("images are made for x86_64 and aarch64, not for {other}"),
    }
}

/// A layer of these files: where each is, and where it is to be.
fn layer(target: &Path, files: &[(PathBuf, String)]) -> Result<PathBuf> {
    linked_layer(target, files, &[])
}

/// With symbolic links: their names, and what they point to.
fn linked_layer(target: &Path, files: &[(PathBuf, String)], links: &[(&str, &str)]) -> Result<PathBuf> {
    whole(target, |file| {
        let mut archive = tar::Builder::new(file);
        for (source, name) in files {
            let file = File::open(source).with_context(|| format!("cannot open {}", source.display()))?;
            append(&mut archive, name.trim_start_matches('/'), 0o755, &file, file.metadata()?.len())?;
        }
        for (name, points_to) in links {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            archive.append_link(&mut header, name, points_to)?;
        }
        Ok(archive.finish()?)
    })?;
    Ok(target.to_owned())
}

/// A program without its symbols, as the Dockerfile has it.
fn stripped(program: &Path, target: &Path) -> Result<PathBuf> {
    let unfinished = target.with_extension(format!("{}", std::process::id()));
    let output = Command::new("strip").arg("-o").args([&unfinished, program]).output();
    let output = output.context("cannot start strip (binutils)")?;
    if !output.status.success() {
        bail!("strip: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    fs::rename(unfinished, target)?;
    Ok(target.to_owned())
}

/// The shared libraries that a program is linked to, each where the program looks for it.
fn libraries(program: &Path) -> Result<Vec<(PathBuf, String)>> {
    let output = Command::new("ldd").arg(program).output().context("cannot start ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let paths = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.map(|path| (path.into(), path.to_owned())).collect())
}

/// Archives to import.
pub(crate) struct Images {
    /// Without which Services are not served.
    pub(crate) first: Vec<PathBuf>,
    /// Of tests.
    pub(crate) rest: Vec<PathBuf>,
}

/// Builds what is missing; the project's own programs are packed anew.
pub(crate) fn ensure(programs: &Programs, proxy: Proxy, with: Purpose) -> Result<Images> {
    let directory = programs.built("images");
    fs::create_dir_all(&directory)?;
    let file = |name: &str| directory.join(name);
    let upstream = ["pause.tar", "coredns.tar", "agnhost.tar", "shell.tar", "regression.tar", "kube-proxy.tar"];
    if !upstream.iter().all(|name| file(name).exists()) {
        ensure_userland(programs)?;
        step("images of Kubernetes and its tests", || write_upstream(programs, &file))?;
    }
    step("images of svc", || {
        let agent = stripped(&binaries::agent()?, &file("svc-agent"))?;
        // The base has libc6 and libgcc-s1; here they are this machine's, for which the agent was built.
        let base = layer(&file("base.layer"), &libraries(&agent)?)?;
        let own = layer(&file("agent.layer"), &[(agent, "/usr/local/bin/svc-agent".to_owned())])?;
        let image = Image {
            names: AGENT.map(str::to_owned).into(),
            entrypoint: &["/usr/local/bin/svc-agent"],
            arguments: &[],
            layers: vec![base, own],
        };
        image.write(&file("svc-agent.tar"))?;
        let lab = layer(
            &file("lab.layer"),
            &[(stripped(&binaries::lab()?, &file("svc-lab"))?, "/usr/local/bin/svc-lab".to_owned())],
        )?;
        let image = Image {
            names: vec![LAB.to_owned()],
            entrypoint: &["/usr/local/bin/svc-lab"],
            arguments: &[],
            layers: vec![programs.built(USERLAND), lab],
        };
        image.write(&file("lab.tar"))
    })?;
    let mut first = vec!["pause.tar", "coredns.tar"];
    first.extend(proxy.image());
    let files = |names: &[&str]| names.iter().map(|name| file(name)).collect();
    Ok(Images { rest: files(&with.archives(&first)), first: files(&first) })
}

/// What the images of a cluster are for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Whatever there is.
    Any,
    /// Kubernetes' conformance tests of Services.
    Conformance,
}

impl Purpose {
    /// Those that it takes beside the first.
    fn archives(self, first: &[&str]) -> Vec<&'static str> {
        let any = ["agnhost.tar", "lab.tar", "svc-agent.tar", "kube-proxy.tar", "shell.tar", "regression.tar"];
        let all = if self == Purpose::Any { &any[..] } else { &any[..1] };
        all.iter().filter(|name| !first.contains(name)).copied().collect()
    }
}

fn ensure_userland(programs: &Programs) -> Result<()> {
    let target = programs.built(USERLAND);
    if target.exists() {
        return Ok(());
    }
    step("Debian for the images of tests", || {
        let unfinished = programs.built("unfinished.tar");
        // It mounts what its scripts need, and nobody else is to see that.
        let mut command = Command::new("unshare");
        command.args(["--mount", "mmdebstrap", "--quiet", "--mode=root", "--variant=essential"]);
        command.arg(format!("--include={USERLAND_PACKAGES}"));
        command.args(["man", "doc", "locale"].map(|name| format!("--dpkgopt=path-exclude=/usr/share/{name}/*")));
        command.args(USERLAND_HOOKS.map(|hook| format!("--customize-hook={hook}")));
        let output = command.arg("bookworm").arg(&unfinished).output().context("cannot start mmdebstrap")?;
        if !output.status.success() {
            bail!("mmdebstrap: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(fs::rename(unfinished, &target)?)
    })
}

fn write_upstream(programs: &Programs, file: &dyn Fn(&str) -> PathBuf) -> Result<()> {
    let names = upstream_names(programs)?;
    let named = |wanted: &[&str]| -> Vec<String> {
        let is = |name: &&String| wanted.iter().any(|wanted| name.contains(&format!("/{wanted}:")));
        names.iter().filter(is).cloned().collect()
    };
    let userland = programs.built(USERLAND);
    let single = |name: &str| layer(&file(&format!("{name}.layer")), &[(programs.built(name), format!("/{name}"))]);

    Image {
        names: [vec![PAUSE.to_owned()], named(&["pause"])].concat(),
        entrypoint: &["/pause"],
        arguments: &[],
        layers: vec![single("pause")?],
    }
    .write(&file("pause.tar"))?;
    Image {
        names: vec![COREDNS.to_owned()],
        entrypoint: &["/coredns"],
        arguments: &[],
        layers: vec![single("coredns")?],
    }
    .write(&file("coredns.tar"))?;
    Image {
        names: named(&["regression-issue-74839"]),
        entrypoint: &["/regression-issue-74839"],
        arguments: &[],
        layers: vec![single("regression-issue-74839")?],
    }
    .write(&file("regression.tar"))?;

    // As its Dockerfile has it; a few tests run CoreDNS out of it.
    let mut files =
        vec![(programs.built("agnhost"), "/agnhost".to_owned()), (programs.built("coredns"), "/coredns".to_owned())];
    let sources = go::source(&source("kubernetes"), "k8s.io/kubernetes")?.join("test/images/agnhost/porter");
    files.extend(["localhost.crt", "localhost.key"].map(|name| (sources.join(name), format!("/{name}"))));
    Image {
        names: named(&["agnhost"]),
        entrypoint: &["/agnhost"],
        arguments: &["pause"],
        layers: vec![userland.clone(), linked_layer(&file("agnhost.layer"), &files, &[("agnhost-2", "agnhost")])?],
    }
    .write(&file("agnhost.tar"))?;
    // Of these the tests use a shell and a tool or two.
    Image {
        names: named(&["busybox", "glibc-dns-testing", "distroless-iptables"]),
        entrypoint: &[],
        arguments: &["/bin/bash"],
        layers: vec![userland.clone()],
    }
    .write(&file("shell.tar"))?;
    let kube_proxy = [(kube_proxy_binary()?, "/usr/local/bin/kube-proxy".to_owned())];
    Image {
        names: vec![format!("registry.k8s.io/kube-proxy:{}", kubernetes_version()?)],
        entrypoint: &[],
        arguments: &[],
        layers: vec![userland, layer(&file("kube-proxy.layer"), &kube_proxy)?],
    }
    .write(&file("kube-proxy.tar"))
}

/// Those that e2e.test asks for.
fn upstream_names(programs: &Programs) -> Result<Vec<String>> {
    let output =
        Command::new(programs.built("e2e.test")).arg("--list-images").env("KUBECONFIG", "/nonexistent").output();
    let output = output.context("cannot start e2e.test")?;
    let names: Vec<String> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| line.trim().to_owned())
        .filter(|line| line.contains('/') && !line.contains("private"))
        .collect();
    if names.is_empty() {
        bail!("e2e.test names no images: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(names)
}
