//! Line charts as inline SVG. Colours are classes, so that the page decides them for light and dark. Pure.

use std::fmt::Write as _;

/// Size of a chart in its own units; the page scales it.
const WIDTH: f64 = 860.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 84.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 30.0;
/// Points drawn of one line at most: more are not seen, but make the file heavy.
const MOST_POINTS: usize = 600;

/// A line, or dots, over steps.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// CSS class: colour and stroke.
    pub class: &'static str,
    /// Written at the right end of the line.
    pub label: String,
    /// (step, value), ascending; values that are not finite are left out.
    pub points: Vec<(f64, f64)>,
    /// Draws a dot with its value as a tooltip on every point.
    pub dots: bool,
}

/// A chart of `height` units over steps 0 to `steps`. Without a finite point it is empty.
pub fn lines(series: &[Series], steps: f64, height: f64, name: &str, format: fn(f64) -> String) -> String {
    let values = || series.iter().flat_map(|series| &series.points).map(|point| point.1).filter(|value| value.is_finite());
    let highest = values().fold(f64::NEG_INFINITY, f64::max);
    if !highest.is_finite() {
        return String::new();
    }
    let frame = Frame { steps: steps.max(1.0), top: ticks(highest).last().copied().unwrap_or(highest), height };
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">", escape(name));
    for tick in ticks(highest) {
        let y = frame.y(tick);
        let _ = write!(svg, "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>", WIDTH - RIGHT);
        let _ = write!(svg, "<text class=\"tick end\" x=\"{:.1}\" y=\"{:.1}\">{}</text>", LEFT - 8.0, y + 4.0, format(tick));
    }
    for tick in ticks(frame.steps).into_iter().filter(|&tick| tick <= frame.steps) {
        let _ = write!(svg, "<text class=\"tick middle\" x=\"{:.1}\" y=\"{:.1}\">{tick:.0}</text>", frame.x(tick), height - 8.0);
    }
    let mut labels: Vec<(f64, &Series)> = Vec::new();
    for series in series {
        let points: Vec<_> = thin(&series.points).into_iter().filter(|point| point.1.is_finite()).collect();
        let Some(&(_, last)) = points.last() else { continue };
        let path: Vec<String> = points.iter().map(|&(x, y)| format!("{:.1},{:.1}", frame.x(x), frame.y(y))).collect();
        let _ = write!(svg, "<polyline class=\"{}\" points=\"{}\"/>", series.class, path.join(" "));
        for &(x, y) in points.iter().filter(|_| series.dots) {
            let (cx, cy) = (frame.x(x), frame.y(y));
            let _ = write!(
                svg,
                "<circle class=\"{}\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"4\"><title>step {x:.0}: {}</title></circle>",
                series.class,
                format(y)
            );
        }
        labels.push((frame.y(last), series));
    }
    for (y, series) in spread(labels) {
        let _ = write!(
            svg,
            "<text class=\"name {}\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            series.class,
            WIDTH - RIGHT + 8.0,
            y + 4.0,
            escape(&series.label)
        );
    }
    svg + "</svg>"
}

struct Frame {
    steps: f64,
    top: f64,
    height: f64,
}

impl Frame {
    fn x(&self, step: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * step / self.steps
    }

    fn y(&self, value: f64) -> f64 {
        TOP + (self.height - TOP - BOTTOM) * (1.0 - value / self.top)
    }
}

/// Round numbers from 0 to just beyond `highest`, five or so.
fn ticks(highest: f64) -> Vec<f64> {
    if highest <= 0.0 {
        return vec![0.0, 1.0];
    }
    let rough = highest / 4.0;
    let power = 10f64.powf(rough.log10().floor());
    let unit =
        [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|&unit| unit >= rough * 0.999).unwrap_or(10.0 * power);
    (0..=(highest / unit).ceil() as u32).map(|count| f64::from(count) * unit).collect()
}

/// Every n-th point, the last one always.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let every = points.len().div_ceil(MOST_POINTS).max(1);
    let last = points.len().saturating_sub(1);
    points.iter().enumerate().filter(|(index, _)| index % every == 0 || *index == last).map(|(_, point)| *point).collect()
}

/// Moves labels apart that would lie on each other.
fn spread(mut labels: Vec<(f64, &Series)>) -> Vec<(f64, &Series)> {
    labels.sort_by(|left, right| left.0.total_cmp(&right.0));
    for index in 1..labels.len() {
        labels[index].0 = labels[index].0.max(labels[index - 1].0 + 15.0);
    }
    labels
}

/// Mean over the points up to `reach` before and behind each.
pub fn smooth(points: &[(f64, f64)], reach: usize) -> Vec<(f64, f64)> {
    let mean = |index: usize| {
        let window = &points[index.saturating_sub(reach)..(index + reach + 1).min(points.len())];
        window.iter().map(|point| point.1).sum::<f64>() / window.len() as f64
    };
    (0..points.len()).map(|index| (points[index].0, mean(index))).collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_highest_value() {
        assert_eq!(ticks(1.309), [0.0, 0.5, 1.0, 1.5]);
        assert_eq!(ticks(375.0), [0.0, 100.0, 200.0, 300.0, 400.0]);
        assert_eq!(ticks(0.0), [0.0, 1.0]);
    }

    #[test]
    fn labels_are_escaped_and_nan_leaves_no_trace() {
        let series =
            Series { class: "train", label: "<a & b>".to_owned(), points: vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 0.5)], dots: true };
        let svg = lines(&[series], 2.0, 200.0, "loss", |value| format!("{value:.1}"));
        assert!(svg.contains("&lt;a &amp; b&gt;") && !svg.contains("NaN") && svg.matches("<circle").count() == 2, "{svg}");
        assert_eq!(lines(&[], 1.0, 100.0, "x", |_| String::new()), "");
    }

    #[test]
    fn smoothing_looks_both_ways() {
        let points = [(1.0, 3.0), (2.0, 0.0), (3.0, 6.0)];
        assert_eq!(smooth(&points, 1), [(1.0, 1.5), (2.0, 3.0), (3.0, 3.0)]);
        assert_eq!(smooth(&points, 0), points);
    }

    #[test]
    fn a_long_line_is_thinned_but_keeps_its_end() {
        let points: Vec<_> = (0..10_000).map(|step| (f64::from(step), 1.0)).collect();
        let thinned = thin(&points);
        assert!(thinned.len() <= MOST_POINTS + 1 && thinned.last() == points.last());
    }
}
