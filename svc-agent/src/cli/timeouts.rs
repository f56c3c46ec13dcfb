//! How long flows live without a packet. The flags are kube-proxy's, where it has one.
use std::time::Duration;

use svc_common::flow::Timeouts;

#[derive(clap::Args, Clone, Copy, Debug)]
pub struct TimeoutArgs {
    /// An established TCP flow, as 24h, 90m or 1h30m [default: 24h, or for 0].
    #[arg(long, value_name = "TIME", value_parser = parse, default_value = "0", hide_default_value = true)]
    conntrack_tcp_timeout_established: u32,

    /// A TCP flow of which one side has ended [default: 1h, or for 0].
    #[arg(long, value_name = "TIME", value_parser = parse, default_value = "0", hide_default_value = true)]
    conntrack_tcp_timeout_close_wait: u32,

    /// A UDP flow with packets one way only [default: 30s, or for 0].
    #[arg(long, value_name = "TIME", value_parser = parse, default_value = "0", hide_default_value = true)]
    conntrack_udp_timeout: u32,

    /// A UDP flow with packets both ways [default: 2m, or for 0].
    #[arg(long, value_name = "TIME", value_parser = parse, default_value = "0", hide_default_value = true)]
    conntrack_udp_timeout_stream: u32,

    /// An established SCTP flow; kube-proxy has no flag for it [default: 3m30s, or for 0].
    #[arg(long, value_name = "TIME", value_parser = parse, default_value = "0", hide_default_value = true)]
    conntrack_sctp_timeout_established: u32,
}

impl TimeoutArgs {
    pub fn timeouts(&self) -> Timeouts {
        let or = |seconds: u32, default: u32| if seconds == 0 { default } else { seconds };
        let default = Timeouts::DEFAULT;
        Timeouts {
            tcp_established: or(self.conntrack_tcp_timeout_established, default.tcp_established),
            tcp_closing: or(self.conntrack_tcp_timeout_close_wait, default.tcp_closing),
            udp: or(self.conntrack_udp_timeout, default.udp),
            udp_stream: or(self.conntrack_udp_timeout_stream, default.udp_stream),
            sctp_established: or(self.conntrack_sctp_timeout_established, default.sctp_established),
        }
    }
}

/// Seconds.
fn parse(text: &str) -> Result<u32, String> {
    if text == "0" || text == "0s" {
        return Ok(0);
    }
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let most = Duration::from_secs(Timeouts::MAX.into());
    if time < Duration::from_secs(1) || time > most {
        return Err(format!("not between 1s and {}", humantime::format_duration(most)));
    }
    Ok(time.as_secs() as u32)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn times_are_read_as_kube_proxy_writes_them() {
        let of = |text: &str| parse(text).ok();
        let texts = ["0", "0s", "24h0m0s", "90m", "1h30m", "45s", "36h", "37h", "500ms", "soon", "-1s", "10"];
        let seconds = [Some(0), Some(0), Some(86_400), Some(5400), Some(5400), Some(45), Some(129_600)];
        assert_eq!(texts.map(of)[..7], seconds);
        assert_eq!(texts.map(of)[7..], [None; 5]);
    }
}
