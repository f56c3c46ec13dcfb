//! The archive that a kernel unpacks into memory as its first file system: cpio's "newc" form, as
//! Documentation/driver-api/early-userspace/buffer-format.rst of Linux has it.
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};

pub(super) struct Archive {
    out: BufWriter<File>,
    /// What is there already.
    names: BTreeSet<String>,
    position: usize,
}

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;

impl Archive {
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Archive { out: BufWriter::new(file), names: BTreeSet::new(), position: 0 })
    }

    /// A directory, and those that it is in.
    pub(super) fn directory(&mut self, path: &Path) -> Result<()> {
        let parents: Vec<&Path> = path.ancestors().collect();
        for directory in parents.into_iter().rev() {
            self.entry(directory, DIRECTORY, b"")?;
        }
        Ok(())
    }

    /// A file that may be run.
    pub(super) fn file(&mut self, path: &Path, content: &[u8]) -> Result<()> {
        self.directory(path.parent().context("a file needs a directory")?)?;
        self.entry(path, PROGRAM, content)
    }

    pub(super) fn copy(&mut self, from: &Path, path: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.file(path, &content)
    }

    pub(super) fn link(&mut self, path: &Path, target: &str) -> Result<()> {
        self.directory(path.parent().context("a link needs a directory")?)?;
        self.entry(path, LINK, target.as_bytes())
    }

    pub(super) fn finish(mut self) -> Result<()> {
        self.write("TRAILER!!!", 0, b"")?;
        Ok(self.out.flush()?)
    }

    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        let name = path.to_string_lossy().trim_start_matches('/').to_owned();
        if name.is_empty() || !self.names.insert(name.clone()) {
            return Ok(());
        }
        self.write(&name, mode, content)
    }

    fn write(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        let header = header(self.names.len(), mode, content.len(), name.len() + 1);
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(b"\0")?;
        self.pad()?;
        self.put(content)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.position += bytes.len();
        Ok(self.out.write_all(bytes)?)
    }

    fn pad(&mut self) -> Result<()> {
        let padding = self.position.next_multiple_of(4) - self.position;
        self.put(&b"\0\0\0"[..padding])
    }
}

fn header(inode: usize, mode: u32, size: usize, name_size: usize) -> String {
    let (root, links, time, device, checksum) = (0, 1, 0, 0, 0);
    let fields = [inode, mode as usize, root, root, links, time, size, device, device, device, device];
    let fields: String = fields.iter().chain(&[name_size, checksum]).map(|field| format!("{field:08x}")).collect();
    format!("070701{fields}")
}

#[cfg(test)]
mod tests {
    use super::header;

    #[test]
    fn a_header_is_a_magic_number_and_thirteen_fields() {
        let header = header(7, 0o100_755, 0x1234, 5);
        assert_eq!(header.len(), 6 + 13 * 8);
        assert!(header.starts_with("07070100000007000081ed"), "{header}");
        assert_eq!((&header[54..62], &header[94..102]), ("00001234", "00000005"));
    }
}
