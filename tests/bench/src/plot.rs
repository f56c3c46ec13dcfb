//! Plots of the figures, by plotters: SVG without a background, in colours that are readable on white and on black.
use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::{
    ChartBuilder, Color as _, DrawingArea, IntoDrawingArea as _, IntoFont as _, IntoLogRange as _, LineSeries,
    PathElement, RGBColor, SVGBackend, TRANSPARENT, Text,
};

use crate::figure::{Figure, Spread};

const SIZE: (u32, u32) = (920, 480);
const GREY: RGBColor = RGBColor(0x80, 0x80, 0x80);
const COLOURS: [RGBColor; 8] = [
    RGBColor(0x2f, 0x81, 0xf7),
    RGBColor(0xe0, 0x6c, 0x2b),
    RGBColor(0x2e, 0xa0, 0x43),
    RGBColor(0xe5, 0x53, 0x4b),
    RGBColor(0xa3, 0x71, 0xf7),
    RGBColor(0xc9, 0x8a, 0x00),
    RGBColor(0xdb, 0x61, 0xa2),
    RGBColor(0x1b, 0xa3, 0xa3),
];

/// Points of each contestant.
type Series = BTreeMap<String, Vec<(f64, f64)>>;

struct Plot {
    file: &'static str,
    title: &'static str,
    x: &'static str,
    y: &'static str,
    series: Series,
}

/// Those that there are figures for.
pub(crate) fn draw(directory: &Path, figures: &[Figure]) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let plots = [
        Plot {
            file: "p1-flows.svg",
            title: "P1, P2: a NodePort's packet of a known flow, UDP",
            x: "flows",
            y: "CPU ns a packet",
            series: medians(figures, "P1", "UDP, ", "flows"),
        },
        Plot {
            file: "p3-services.svg",
            title: "P3: a NodePort's packet beside other Services, 16,384 flows",
            x: "Services",
            y: "CPU ns a packet",
            series: medians(figures, "P3", "UDP, ", "Services"),
        },
        Plot {
            file: "p4-services.svg",
            title: "P4: from the making of a flow's first packet to its arrival behind the node, p50",
            x: "Services",
            y: "us",
            series: medians(figures, "P4", "first packet from its making to the far end, p50", "Services"),
        },
        Plot {
            file: "p9-changes.svg",
            title: "P9: one endpoint change, from the API write to the new backend answering",
            x: "ms",
            y: "share of the changes that took longer",
            series: distributions(figures, "P9", "one endpoint change"),
        },
        Plot {
            file: "p10-start.svg",
            title: "P10: start to the last Service answering",
            x: "Services",
            y: "s",
            series: medians(figures, "P10", "start to the last", "Services"),
        },
    ];
    for plot in plots.iter().filter(|plot| plot.series.values().any(|points| points.len() > 1)) {
        let path = directory.join(plot.file);
        plot.draw(&path).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    }
    Ok(())
}

/// By the number before `unit`, in the contestant's name or else in the case.
fn medians(figures: &[Figure], row: &str, case: &str, unit: &str) -> Series {
    let mut series: BTreeMap<String, BTreeMap<u64, f64>> = BTreeMap::new();
    for figure in figures.iter().filter(|figure| figure.row == row && figure.case.starts_with(case)) {
        for (name, samples) in &figure.samples {
            let own = number_before(name, unit);
            let Some(number) = own.or_else(|| number_before(&figure.case, unit)).or((unit == "Services").then_some(1))
            else {
                continue;
            };
            let name = if own.is_some() { name.split(", ").next().unwrap_or(name) } else { name };
            series.entry(name.to_owned()).or_default().insert(number, Spread::of(samples).median);
        }
    }
    let points = |points: BTreeMap<u64, f64>| points.into_iter().map(|(x, y)| (x as f64, y)).collect();
    series.into_iter().map(|(name, of_name)| (name, points(of_name))).collect()
}

/// What share of the samples is larger.
fn distributions(figures: &[Figure], row: &str, case: &str) -> Series {
    let mut series = Series::new();
    for figure in figures.iter().filter(|figure| figure.row == row && figure.case.starts_with(case)) {
        let services = number_before(&figure.case, "Services").unwrap_or_default();
        for (name, samples) in &figure.samples {
            let mut sorted = samples.clone();
            sorted.sort_by(f64::total_cmp);
            let count = sorted.len() as f64;
            let points = sorted.into_iter().enumerate().map(|(index, x)| (x, 1.0 - index as f64 / count));
            series.insert(format!("{name}, {services} Services"), points.collect());
        }
    }
    series
}

fn number_before(text: &str, unit: &str) -> Option<u64> {
    let words: Vec<&str> = text.split([' ', ',']).filter(|word| !word.is_empty()).collect();
    words.windows(2).find(|pair| pair[1] == unit).and_then(|pair| pair[0].parse().ok())
}

/// A little more than the values take, and as much as has a label, which powers of ten have; a logarithmic axis has no place for what
/// is not positive.
fn range(values: impl Iterator<Item = f64>) -> Range<f64> {
    let positive: Vec<f64> = values.filter(|value| *value > 0.0).collect();
    let least = positive.iter().copied().fold(f64::INFINITY, f64::min);
    let most = positive.iter().copied().fold(0.0, f64::max);
    let (least, most) = (least / 1.25, most * 1.25);
    let (below, above) = (least.log10().floor(), most.log10().ceil());
    if above - below > 1.0 { least..most } else { 10f64.powf(below)..10f64.powf(above) }
}

impl Plot {
    fn draw(&self, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
        let points = || self.series.values().flatten();
        let (x, y) = (range(points().map(|point| point.0)), range(points().map(|point| point.1)));
        let font = |size: u32| ("sans-serif", size).into_font().color(&GREY);
        let root = SVGBackend::new(path, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(14)
            .margin_right(290)
            .caption(self.title, font(17))
            .x_label_area_size(44)
            .y_label_area_size(70)
            .build_cartesian_2d(x.log_scale(), y.log_scale())?;
        chart
            .configure_mesh()
            .axis_style(GREY)
            .bold_line_style(GREY.mix(0.35))
            .light_line_style(TRANSPARENT)
            .label_style(font(13))
            .axis_desc_style(font(14))
            .x_desc(self.x)
            .y_desc(self.y)
            .x_label_formatter(&|value| short(*value))
            .y_label_formatter(&|value| short(*value))
            .draw()?;
        let mut names = Vec::new();
        for ((name, points), colour) in self.series.iter().zip(COLOURS.iter().cycle()) {
            let positive = points.iter().copied().filter(|point| point.0 > 0.0 && point.1 > 0.0);
            chart.draw_series(LineSeries::new(positive, colour.stroke_width(2)).point_size(3))?;
            names.push((name, *colour));
        }
        legend(&root, &names)?;
        root.present()?;
        Ok(())
    }
}

/// Beside the plot, so that it covers no line.
fn legend(
    root: &DrawingArea<SVGBackend<'_>, Shift>,
    names: &[(&String, RGBColor)],
) -> Result<(), Box<dyn std::error::Error>> {
    for (index, (name, colour)) in names.iter().enumerate() {
        let (x, y) = (SIZE.0 as i32 - 292, 56 + 24 * index as i32);
        root.draw(&PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(3)))?;
        let style = ("sans-serif", 13).into_font().color(&GREY);
        root.draw(&Text::new(name.as_str(), (x + 26, y - 7), style))?;
    }
    Ok(())
}

fn short(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{} M", value / 1e6),
        value if value >= 1e4 => format!("{} k", value / 1e3),
        value => format!("{value}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{medians, number_before, range};
    use crate::figure::Figure;

    #[test]
    fn numbers_stand_before_their_unit() {
        assert_eq!(number_before("UDP, 16384 flows", "flows"), Some(16_384));
        assert_eq!(number_before("svc XDP, 100 Services", "Services"), Some(100));
        assert_eq!(number_before("svc XDP", "Services"), None);
    }

    #[test]
    fn a_contestants_own_number_comes_first() {
        let mut figure = Figure::new("P3", "UDP, 16384 flows".to_owned(), "ns");
        for (name, sample) in [("svc XDP", 1.0), ("svc XDP, 100 Services", 2.0)] {
            figure.add(name, sample);
        }
        let series = medians(&[figure], "P3", "UDP", "Services");
        assert_eq!(series["svc XDP"], [(1.0, 1.0), (100.0, 2.0)]);
    }

    #[test]
    fn what_is_not_positive_has_no_place_on_an_axis() {
        assert_eq!(range([-1.0, 0.0, 1.0].into_iter()), 0.8..1.25);
    }

    #[test]
    fn an_axis_has_a_label() {
        assert_eq!(range([30.0, 60.0].into_iter()), 10.0..100.0);
    }
}
