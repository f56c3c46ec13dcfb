//! `svc-agent man`: manual pages, one a subcommand.
use std::path::PathBuf;

use anyhow::Context as _;
use clap::CommandFactory as _;

use super::{Cli, print};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Where they are written, svc-agent.1 and svc-agent-SUBCOMMAND.1 [default: svc-agent.1 alone, to standard output].
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,
}

/// # Errors
/// Where a page cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    match &args.directory {
        Some(directory) => clap_mangen::generate_to(Cli::command(), directory)
            .with_context(|| format!("writing manual pages to {}", directory.display())),
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut page)?;
            print::text(&String::from_utf8(page)?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_subcommand_has_a_page() {
        let directory = tempfile::tempdir().unwrap();
        run(&Args { directory: Some(directory.path().to_owned()) }).unwrap();
        for subcommand in Cli::command().get_subcommands() {
            let page = std::fs::read_to_string(directory.path().join(format!("svc-agent-{}.1", subcommand.get_name())));
            assert!(page.unwrap().contains(".TH"), "{}", subcommand.get_name());
        }
    }
}
