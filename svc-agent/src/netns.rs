//! The network namespaces of a machine: those of its processes, and those that have a name.
use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// This thread's own.
const OWN: &str = "/proc/thread-self/ns/net";

/// Where network namespaces are found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Places {
    /// A procfs (proc(5)): its processes are asked for theirs.
    pub proc: PathBuf,
    /// Directories of named ones (ip-netns(8)); what does not exist holds none.
    pub named: Vec<PathBuf>,
}

/// Places that were not to be looked at, beside those that went away meanwhile.
#[derive(Default, PartialEq, Debug)]
pub struct Hidden {
    pub count: usize,
    /// Which was the first, and why.
    pub first: Option<String>,
}

/// Visits each network namespace once, but for this thread's own. What comes or goes meanwhile may be missed.
pub fn visit(places: &Places, mut visit: impl FnMut(&Path, &File)) -> Hidden {
    let mut hidden = Hidden::default();
    let mut seen: HashSet<(u64, u64)> = fs::metadata(OWN).map(|own| (own.dev(), own.ino())).into_iter().collect();
    for path in processes(&places.proc).chain(places.named.iter().flat_map(|directory| entries(directory))) {
        match open(&path, &mut seen) {
            Ok(Some(namespace)) => visit(&path, &namespace),
            Ok(None) => {}
            Err(error) if has_gone(&error) => {}
            Err(error) => {
                hidden.count += 1;
                hidden.first.get_or_insert_with(|| format!("{}: {error}", path.display()));
            }
        }
    }
    hidden
}

/// None where it is one that was seen.
fn open(path: &Path, seen: &mut HashSet<(u64, u64)>) -> io::Result<Option<File>> {
    let identity = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
    if seen.contains(&identity(&fs::metadata(path)?)) {
        return Ok(None);
    }
    // Whatever else stands in a directory of names must not block.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let is_new = seen.insert(identity(&file.metadata()?));
    Ok(is_new.then_some(file))
}

fn has_gone(error: &io::Error) -> bool {
    // A process that has ended and was not waited for has none any more.
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

fn processes(proc: &Path) -> impl Iterator<Item = PathBuf> {
    let is_process = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(|byte| byte.is_ascii_digit()))
    };
    entries(proc).filter(is_process).map(|path| path.join("ns/net"))
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Moves the calling thread, for good.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN, EINVAL where it is no network namespace.
pub fn enter(namespace: &File) -> io::Result<()> {
    // SAFETY: it takes a descriptor that is open for the whole call, and touches no memory of ours.
    if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether this process may move between network namespaces at all.
///
/// # Errors
/// As [`enter`].
pub fn may_enter() -> io::Result<()> {
    // Where the thread is already.
    enter(&File::open(OWN)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn visited(places: &Places) -> (Vec<PathBuf>, Hidden) {
        let mut paths = Vec::new();
        let hidden = visit(places, |path, _| paths.push(path.to_owned()));
        paths.sort();
        (paths, hidden)
    }

    #[test]
    fn each_is_visited_once_whatever_stands_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let [proc, named] = ["proc", "named"].map(|name| directory.path().join(name));
        let namespace = |name: &str| {
            let path = directory.path().join(name);
            File::create(&path).unwrap();
            path
        };
        let (one, two) = (namespace("one"), namespace("two"));
        for (process, target) in
            [("7", &one), ("8", &one), ("9", &directory.path().join("gone")), ("self", &namespace("not a process"))]
        {
            let ns = proc.join(process).join("ns");
            fs::create_dir_all(&ns).unwrap();
            symlink(target, ns.join("net")).unwrap();
        }
        // The process has ended.
        fs::create_dir(proc.join("10")).unwrap();
        fs::create_dir(&named).unwrap();
        fs::hard_link(&one, named.join("one")).unwrap();
        fs::hard_link(&two, named.join("two")).unwrap();

        let named = vec![named, directory.path().join("missing")];
        let (paths, hidden) = visited(&Places { proc: proc.clone(), named: named.clone() });
        assert_eq!(hidden, Hidden::default());
        assert_eq!(paths.len(), 2, "{paths:?}");
        assert!([proc.join("7/ns/net"), proc.join("8/ns/net")].contains(&paths[1]), "{paths:?}");
        assert_eq!(paths[0], named[0].join("two"));
    }

    #[test]
    fn the_own_one_is_not_visited() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("1/ns")).unwrap();
        symlink("/proc/self/ns/net", directory.path().join("1/ns/net")).unwrap();
        assert_eq!(visited(&Places { proc: directory.path().to_owned(), named: Vec::new() }).0, Vec::<PathBuf>::new());
    }

    #[test]
    fn what_may_not_be_looked_at_is_counted() {
        let directory = tempfile::tempdir().unwrap();
        for process in ["1", "2"] {
            fs::create_dir_all(directory.path().join(process).join("ns")).unwrap();
            // A loop of links cannot be followed by anybody, root included.
            symlink("net", directory.path().join(process).join("ns/net")).unwrap();
        }
        let (paths, hidden) = visited(&Places { proc: directory.path().to_owned(), named: Vec::new() });
        assert!(paths.is_empty());
        assert_eq!(hidden.count, 2);
        assert!(hidden.first.unwrap().contains("ns/net"));
    }
}
