//! `svc-agent completions`: what a shell completes svc-agent's arguments by.
use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{Cli, print};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

/// # Errors
/// Where stdout does not take it.
pub fn run(args: &Args) -> anyhow::Result<()> {
    print::text(&String::from_utf8(script(args.shell))?)
}

fn script(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "svc-agent", &mut script);
    script
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn every_shell_completes_every_subcommand() {
        for shell in Shell::value_variants() {
            let script = String::from_utf8(script(*shell)).unwrap();
            for subcommand in Cli::command().get_subcommands() {
                assert!(script.contains(subcommand.get_name()), "{shell}: {}", subcommand.get_name());
            }
        }
    }
}
