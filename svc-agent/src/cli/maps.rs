//! `svc-agent maps`: how full each map is, and what gives it more room.
use serde::Serialize;
use svc_common::map::pin;

use super::print::{self, Inspect, Row, or_dash};
use super::status::percent;
use crate::inspect::{FlowTable, Pins, Size};

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    inspect: Inspect,
}

/// One map.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MapRow {
    pub map: &'static str,
    pub entries: usize,
    pub max_entries: usize,
    /// What of `svc-agent run` sets its size; none where nothing does.
    pub flag: Option<&'static str>,
    pub holds: &'static str,
}

impl Row for MapRow {
    const HEADER: &'static [&'static str] = &["MAP", "ENTRIES", "SIZE", "USE", "SIZED BY", "HOLDS"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.map.to_owned(),
            self.entries.to_string(),
            self.max_entries.to_string(),
            percent(self.entries, self.max_entries),
            or_dash(self.flag),
            self.holds.to_owned(),
        ]
    }
}

/// # Errors
/// Where the pins cannot be read.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let pins = Pins::open(&args.inspect.bpffs)?;
    print::rows(args.inspect.output, &rows(pins.sizes(&pins.state()?)?, pins.flow_table()?))
}

pub fn rows(sizes: Vec<Size>, flows: FlowTable) -> Vec<MapRow> {
    let flows = Size { map: pin::FLOWS, entries: flows.used, max_entries: flows.cells };
    sizes.into_iter().chain([flows]).map(row).collect()
}

fn row(Size { map, entries, max_entries }: Size) -> MapRow {
    let (flag, holds) = match map {
        pin::FRONTENDS => (Some("--max-frontends"), "addresses of Services with port and protocol"),
        pin::SERVICES => (Some("--max-services"), "names of Service ports, each family for itself"),
        pin::BACKEND_SETS => (Some("--max-services"), "backends of a Service port, all and this node's"),
        pin::BACKENDS => (Some("--max-backends"), "backends by id"),
        pin::ADDRESSES => (Some("--max-services"), "addresses of Services and of this node"),
        pin::SOURCE_RANGES => (None, "sources that restricted Services serve"),
        pin::CIDRS => (None, "ranges of pods and of ClusterIPs"),
        pin::UPLINKS => (None, "source addresses by interface"),
        pin::SOCKETS => (Some("--flow-table-size"), "sockets that were pointed at backends; the oldest make room"),
        pin::AFFINITY => (None, "clients that stay with a backend; the oldest make room"),
        pin::FRAGMENTS => (None, "datagrams in pieces; the oldest make room"),
        pin::FLOWS => (Some("--flow-table-size"), "flows, two cells each"),
        _ => (None, ""),
    };
    MapRow { map, entries, max_entries, flag, holds }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_told_with_what_gives_it_more_room() {
        let sizes = vec![
            Size { map: pin::FRONTENDS, entries: 3, max_entries: 131_072 },
            Size { map: pin::AFFINITY, entries: 0, max_entries: 65_536 },
        ];
        let rows = rows(sizes, FlowTable { cells: 1024, used: 512, expired: 100 });
        insta::assert_snapshot!(print::table(&rows), @"
        MAP         ENTRIES   SIZE     USE     SIZED BY            HOLDS
        frontends   3         131072   <0.1%   --max-frontends     addresses of Services with port and protocol
        affinity    0         65536    0%      -                   clients that stay with a backend; the oldest make room
        flows       512       1024     50.0%   --flow-table-size   flows, two cells each
        ");
    }
}
