use std::process::ExitCode;

use svc_agent::cli::Cli;

fn main() -> ExitCode {
    Cli::from_arguments().run()
}
