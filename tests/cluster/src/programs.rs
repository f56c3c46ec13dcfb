//! What the cluster is made of: programs of Go modules, built once, and Debian's runc and CNI plugins.
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use svc_lab::control_plane::{self, binaries_directory, kube_proxy_binary, kubectl_binary};
use svc_lab::go;

/// Directories with a go.mod. Each has the versions of its dependencies that its own release was made with: one for all
/// would take the newest of each, and neither kubelet nor e2e.test would be upstream's.
const MODULES: [(&str, &str); 3] = [
    ("kubernetes", "k8s.io/kubernetes"),
    ("containerd", "github.com/containerd/containerd/v2"),
    ("images", "github.com/coredns/coredns"),
];
/// Module, program, package.
const PROGRAMS: [(&str, &str, &str); 11] = [
    ("containerd", "containerd", "github.com/containerd/containerd/v2/cmd/containerd"),
    ("containerd", "containerd-shim-runc-v2", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"),
    ("containerd", "ctr", "github.com/containerd/containerd/v2/cmd/ctr"),
    ("kubernetes", "kubelet", "k8s.io/kubernetes/cmd/kubelet"),
    ("kubernetes", "kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    ("kubernetes", "kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
    ("kubernetes", "agnhost", "k8s.io/kubernetes/test/images/agnhost"),
    ("kubernetes", "regression-issue-74839", "k8s.io/kubernetes/test/images/regression-issue-74839"),
    ("kubernetes", "ginkgo", "github.com/onsi/ginkgo/v2/ginkgo"),
    ("images", "coredns", "./coredns"),
    ("images", "pause", "./pause"),
];
/// The programs of a Debian, for those images whose users expect some.
pub(crate) const USERLAND: &str = "userland.tar";
const TESTS: (&str, &str, &str) = ("kubernetes", "e2e.test", "k8s.io/kubernetes/test/e2e");
/// Where Debian's packages have them.
pub(crate) const RUNC: &str = "/usr/sbin/runc";
pub(crate) const CNI_PLUGINS: &str = "/usr/lib/cni";

/// The programs that are not built yet.
pub(crate) fn missing() -> Result<Vec<String>> {
    let built = directory()?;
    let own = PROGRAMS.into_iter().chain([TESTS]).map(|(_, name, _)| built.join(name));
    let all = own.chain([built.join(USERLAND)]).chain(control_plane::binaries()?);
    let missing =
        all.filter(|path| !path.exists()).map(|path| path.file_name().unwrap_or_default().display().to_string());
    Ok(missing.collect())
}

/// Where all programs are.
pub(crate) struct Programs {
    built: PathBuf,
    control_plane: PathBuf,
}

impl Programs {
    /// Builds what is missing, which takes half an hour where nothing is there.
    pub(crate) fn ensure() -> Result<Self> {
        let built = directory()?;
        fs::create_dir_all(&built).with_context(|| format!("cannot create {}", built.display()))?;
        for (module, name, package) in PROGRAMS {
            go::build(&source(module), &[], package, &built.join(name))?;
        }
        let (module, name, package) = TESTS;
        go::build_test(&source(module), package, &built.join(name))?;
        for (path, package) in [(RUNC, "runc"), (CNI_PLUGINS, "containernetworking-plugins")] {
            if !Path::new(path).exists() {
                bail!("{path} is missing, of Debian's package {package}");
            }
        }
        kube_proxy_binary()?;
        kubectl_binary()?;
        Ok(Programs { built, control_plane: binaries_directory()? })
    }

    /// The one that is built for the cluster.
    pub(crate) fn built(&self, name: &str) -> PathBuf {
        self.built.join(name)
    }

    /// kube-apiserver or etcd.
    pub(crate) fn control_plane(&self, name: &str) -> PathBuf {
        self.control_plane.join(name)
    }
}

/// Below the cache; other versions are other directories.
pub(crate) fn directory() -> Result<PathBuf> {
    let mut stamp = Vec::new();
    for (directory, module) in MODULES {
        let requirements = fs::read_to_string(source(directory).join("go.mod"))
            .with_context(|| format!("cannot read tests/cluster/{directory}/go.mod"))?;
        let name = module.trim_end_matches("/v2").rsplit('/').next().unwrap_or(module);
        stamp.push(format!("{name}-{}", go::version(&requirements, module)?));
    }
    Ok(go::cache()?.join("cluster").join(stamp.join("-")))
}

/// Below tests/cluster.
pub(crate) fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}
