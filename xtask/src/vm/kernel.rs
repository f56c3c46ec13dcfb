//! Debian's kernels: fetched from its package registry, unpacked, never installed.
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::step::{done, output, step};

/// What the tests need that is no part of the kernel proper.
const MODULES: [&str; 8] = ["veth", "bridge", "sch_ingress", "cls_bpf", "tun", "ipip", "sit", "ip_gre"];

pub(super) struct Kernel {
    pub(super) series: String,
    pub(super) release: String,
    pub(super) image: PathBuf,
    /// In the order in which they can be loaded.
    pub(super) modules: Vec<PathBuf>,
}

fn place(directory: &Path, series: &str) -> PathBuf {
    directory.join(format!("linux-{series}"))
}

pub(super) fn is_kept(directory: &Path, series: &str) -> bool {
    place(directory, series).exists()
}

/// The newest kernel of this series. One that was fetched before is taken as it is.
pub(super) fn ensure(directory: &Path, series: &str) -> Result<Kernel> {
    let kept = place(directory, series);
    if kept.exists() {
        done(&format!("Linux {series}"), "there already");
    } else {
        fetch(directory, series, &kept)?;
    }
    let read = |name: &str| {
        let path = kept.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let modules = read("modules")?.lines().map(|name| kept.join(name)).collect();
    Ok(Kernel { series: series.to_owned(), release: read("release")?, image: kept.join("vmlinuz"), modules })
}

fn fetch(directory: &Path, series: &str, kept: &Path) -> Result<()> {
    let package = newest(series)?;
    let unpacked = download(directory, &package)?;
    let new = directory.join("new");
    remove(&new)?;
    fs::create_dir(&new)?;
    let release = package.trim_start_matches("linux-image-");
    fs::copy(unpacked.join("boot").join(format!("vmlinuz-{release}")), new.join("vmlinuz"))
        .with_context(|| format!("{package} has no kernel"))?;
    let mut modules = Modules { all: Vec::new(), loaded: BTreeSet::new(), order: Vec::new(), to: new.clone() };
    files(&unpacked.join("lib/modules"), &mut modules.all)?;
    MODULES.iter().try_for_each(|name| modules.add(name))?;
    fs::write(new.join("modules"), modules.order.join("\n"))?;
    fs::write(new.join("release"), release)?;
    remove(&unpacked)?;
    fs::rename(&new, kept).with_context(|| format!("cannot make {}", kept.display()))
}

/// A package's files, in a directory of their own.
pub(super) fn download(directory: &Path, package: &str) -> Result<PathBuf> {
    let unpacked = directory.join("unpacked");
    remove(&unpacked)?;
    fs::create_dir(&unpacked)?;
    step(package, Command::new("apt-get").args(["download", "-q", package]).current_dir(&unpacked))?;
    let mut archives = Vec::new();
    files(&unpacked, &mut archives)?;
    let archive = archives.first().with_context(|| format!("apt-get fetched no {package}"))?;
    step(&format!("{package} unpacked"), Command::new("dpkg").arg("-x").arg(archive).arg(&unpacked))?;
    fs::remove_file(archive)?;
    Ok(unpacked)
}

fn remove(directory: &Path) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    Ok(())
}

/// The package's name.
fn newest(series: &str) -> Result<String> {
    let list = |pattern: &str| {
        output(Command::new("apt-cache").args(["search", "--names-only", pattern])).context("cannot ask apt-cache")
    };
    let found = list("^linux-image-.*-cloud-amd64$")?;
    match newest_of(&found, series) {
        Some(package) => Ok(package.to_owned()),
        None => {
            let served: Vec<&str> = found.lines().filter_map(|line| line.split_whitespace().next()).collect();
            bail!("the package registry has no kernel {series}, but these: {}", served.join(" "))
        }
    }
}

fn newest_of<'a>(list: &'a str, series: &str) -> Option<&'a str> {
    let prefix = format!("linux-image-{series}.");
    let names = list.lines().filter_map(|line| line.split_whitespace().next());
    names.filter(|name| name.starts_with(&prefix)).max_by_key(|name| numbers(name))
}

fn numbers(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

struct Modules {
    all: Vec<PathBuf>,
    loaded: BTreeSet<String>,
    order: Vec<String>,
    to: PathBuf,
}

impl Modules {
    /// After those that it depends on. What is no module is in the kernel already.
    fn add(&mut self, name: &str) -> Result<()> {
        let file = self.all.iter().find(|path| module_name(path).as_deref() == Some(name)).cloned();
        let Some(file) = file else { return Ok(()) };
        if !self.loaded.insert(name.to_owned()) {
            return Ok(());
        }
        let content = if file.extension().is_some_and(|extension| extension == "xz") {
            let output = Command::new("xz").arg("-dc").arg(&file).output().context("cannot start xz")?;
            output.stdout
        } else {
            fs::read(&file)?
        };
        for needed in depends(&content) {
            self.add(&needed)?;
        }
        let kept = format!("{name}.ko");
        fs::write(self.to.join(&kept), content)?;
        self.order.push(kept);
        Ok(())
    }
}

/// Files with - in their names are modules with _.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    Some(file.strip_suffix(".xz").unwrap_or(file).strip_suffix(".ko")?.replace('-', "_"))
}

/// What a module says of itself, in its section .modinfo.
fn depends(module: &[u8]) -> Vec<String> {
    let field = module.split(|byte| *byte == 0).find_map(|field| field.strip_prefix(b"depends="));
    let names = String::from_utf8_lossy(field.unwrap_or_default()).into_owned();
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

fn files(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files(&entry.path(), found)?;
        } else {
            found.push(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_series_is_by_number() {
        let list = "linux-image-6.1.0-9-cloud-amd64 - Linux 6.1\n\
                    linux-image-6.1.0-56-cloud-amd64 - Linux 6.1\n\
                    linux-image-6.12.117+deb12-cloud-amd64 - Linux 6.12\n";
        assert_eq!(newest_of(list, "6.1"), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(newest_of(list, "6.12"), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(newest_of(list, "6.6"), None);
    }

    #[test]
    fn a_modules_own_word_on_what_it_needs() {
        assert_eq!(depends(b"\x7fELF\0license=GPL\0depends=stp,llc\0name=bridge\0"), ["stp", "llc"]);
        assert_eq!(depends(b"license=GPL\0depends=\0"), Vec::<String>::new());
        assert_eq!(module_name("net/sched/act-x.ko.xz".as_ref()).as_deref(), Some("act_x"));
    }
}
