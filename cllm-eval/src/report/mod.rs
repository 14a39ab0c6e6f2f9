//! Reports for people, drawn from results.json and samples.jsonl alone: `report` renders a
//! self-contained HTML page, Markdown, LaTeX tables and a model card from templates/, and pictures;
//! `animate` draws one example as an animated SVG.

mod animation;
mod charts;
mod example;
mod heading;
mod headline;
mod model_card;
mod overview;
mod run;
mod section;

use std::path::{Path, PathBuf};

use cllm_core::printable::{to_markdown, to_printable};
use cllm_core::{Error, Result, atomic_file, output_folder, progress};
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, context, default_auto_escape_callback, escape_formatter};

use crate::records::SAMPLES;
use crate::results::RESULTS;
use crate::table::CONCURRENCY_NOTE;
use crate::{suite, svg};
pub use animation::animate;
use heading::Heading;
use run::Run;
use section::Section;

/// The files of a report with their templates. The extension decides how minijinja escapes values.
const TEMPLATES: [(&str, &str); 4] = [
    ("report.md", include_str!("../../templates/report.md")),
    ("report.html", include_str!("../../templates/report.html")),
    ("report.tex", include_str!("../../templates/report.tex")),
    (MODEL_CARD, include_str!("../../templates/model-card.md")),
];

/// The file that is about one model, and so is not written for runs of several.
const MODEL_CARD: &str = "model-card.md";

/// How the values of templates named `.md` are escaped.
const MARKDOWN: &str = "markdown";

/// What a page of ours says about itself.
const GENERATOR: &str = r#"<meta name="generator" content="cllm-eval report">"#;

/// Renders the report of one or several runs into `output`, or beside the first of them, and
/// returns the files that were written. `remarks` are sentences about what has no results. Runs of
/// several models have no model card.
///
/// # Errors
/// When a file is missing, is not a results.json, or cannot be written.
pub fn report(results: &[PathBuf], output: Option<&Path>, remarks: &[String]) -> Result<Vec<PathBuf>> {
    let files: Vec<PathBuf> =
        results.iter().map(|path| if path.is_dir() { path.join(RESULTS) } else { path.clone() }).collect();
    let runs = Run::read_all(&files)?;
    let folder = output_of(results, output);
    output_folder::expect_own(&folder, || is_own(&folder))?;
    let sections: Vec<Section> = runs.iter().map(Section::from_run).collect::<Result<_>>()?;
    let values = context! {
        sections => minijinja::Value::from(Serde(&sections)),
        concurrency_note => CONCURRENCY_NOTE,
        heading => minijinja::Value::from(Serde(&Heading::new(&runs))),
        overview_heads => overview::HEADS,
        remarks => remarks.to_vec(),
        overview => minijinja::Value::from(Serde(&overview::tables(&runs))),
        headline_strategies => model_card::headline_strategies(&runs),
        front_matter => minijinja::Value::from_safe_string(to_printable(&model_card::front_matter(&runs)?)),
        kind => minijinja::Value::from(Serde(model_card::kind(&runs))),
        own_strategy => model_card::own_strategy(&runs).map(minijinja::Value::from_safe_string),
    };
    let has_card = model_card::describes_one_model(&runs);
    if !has_card {
        progress::log(format!(
            "{MODEL_CARD} is not written: it would describe one model, and these runs evaluated several; draw a report \
             of the runs of each model alone"
        ));
    }
    let environment = environment();
    let mut texts = Vec::new();
    for (name, template) in TEMPLATES.into_iter().filter(|(name, _)| has_card || *name != MODEL_CARD) {
        let text = environment
            .render_named_str(name, template, &values)
            .map_err(|error| Error::internal(format!("rendering {name}: {error:#}")))?;
        texts.push((name.to_owned(), text));
    }
    texts.extend(pictures(&runs));
    let write = |(name, text): (String, String)| {
        let path = folder.join(name);
        atomic_file::write(&path, text.as_bytes())?;
        Ok(path)
    };
    texts.into_iter().map(write).collect()
}

/// The folder of a report: that of the first results, if no other is named.
pub fn output_of(results: &[PathBuf], output: Option<&Path>) -> PathBuf {
    let beside = |path: &PathBuf| if path.is_dir() { Some(path.clone()) } else { path.parent().map(Path::to_owned) };
    let folder = output.map(Path::to_owned).or_else(|| results.first().and_then(beside)).unwrap_or_default();
    if folder == Path::new("") { PathBuf::from(".") } else { folder }
}

/// The pictures of each run for papers and READMEs: the chart of accuracy against speed, and the
/// moving example. The files of several runs are numbered.
fn pictures(runs: &[Run]) -> Vec<(String, String)> {
    let mut pictures = Vec::new();
    for (index, run) in runs.iter().enumerate() {
        let number = if runs.len() > 1 { format!("-{}", index + 1) } else { String::new() };
        let chart = charts::tradeoff_svg(run).map(|svg| svg::standalone(&svg));
        pictures.extend(chart.map(|svg| (format!("tradeoff{number}.svg"), svg)));
        let example = run.records.as_ref().and_then(animation::draw_first);
        pictures.extend(example.map(|svg| (format!("example{number}.svg"), svg)));
    }
    pictures
}

/// Whether a folder is that of a run or a suite, or of an earlier report.
fn is_own(folder: &Path) -> bool {
    let is_report = || std::fs::read_to_string(folder.join("report.html")).is_ok_and(|page| page.contains(GENERATOR));
    folder.join(SAMPLES).exists()
        || folder.join(RESULTS).exists()
        || output_folder::has_settings_of(folder, suite::COMMAND)
        || is_report()
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    // Values of Markdown are escaped as those of HTML are.
    environment.set_auto_escape_callback(|name| match name.ends_with(".md") {
        true => AutoEscape::Custom(MARKDOWN.into()),
        false => default_auto_escape_callback(name),
    });
    environment.set_formatter(|out, state, value| match state.auto_escape() {
        AutoEscape::Custom(_) if value.is_safe() => Ok(write!(out, "{value}")?),
        AutoEscape::Custom(_) => Ok(out.write_str(&to_markdown(&value.to_string()))?),
        _ => escape_formatter(out, state, value),
    });
    environment.add_filter("one_line", |text: &str| text.replace(['\n', '\r'], " ").replace('|', "\\|"));
    environment.add_filter("code_block", |text: &str| {
        minijinja::Value::from_safe_string(format!("    {}", to_printable(text).replace('\n', "\n    ")))
    });
    environment.add_filter("tex", escape_latex);
    environment.add_filter("code", |text: &str| {
        let parts = text.split('`').map(svg::escape).enumerate();
        let marked = parts.map(|(index, part)| if index % 2 == 1 { format!("<code>{part}</code>") } else { part });
        minijinja::Value::from_safe_string(marked.collect())
    });
    environment.add_filter("tied", tied);
    // A head breaks between words alone.
    environment.add_filter("unbroken", |head: &str| tied(head).replace('-', "\u{2011}"));
    // The figure of a cell, and its interval.
    environment.add_filter("figure", |cell: &str| cell.split(" (").next().unwrap_or_default().to_owned());
    environment.add_filter("interval", |cell: &str| {
        cell.split_once(" (").map_or_else(String::new, |(_, rest)| rest.trim_end_matches(')').to_owned())
    });
    environment
}

/// A text whose lines break neither between a number and its unit, nor after a minus sign, nor between a
/// strategy and its window.
fn tied(text: &str) -> String {
    let mut tied = String::with_capacity(text.len());
    for word in text.split_inclusive(' ') {
        let unit = word.trim_end_matches([' ', '.', ',', ';', ':', ')']);
        let is_unit = ["%", "ms", "s"].contains(&unit) && tied.trim_end().ends_with(|last: char| last.is_ascii_digit());
        if tied.ends_with(' ') && (is_unit || tied.ends_with("− ") || word.starts_with("n=")) {
            tied.pop();
            tied.push('\u{a0}');
        }
        tied.push_str(word);
    }
    tied
}

fn escape_latex(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => escaped.extend(['\\', character]),
            '\n' | '\r' => escaped.push(' '),
            '|' => escaped.push_str(r"\textbar{}"),
            '\\' => escaped.push_str(r"\textbackslash{}"),
            '~' => escaped.push_str(r"\textasciitilde{}"),
            '^' => escaped.push_str(r"\textasciicircum{}"),
            '<' => escaped.push_str(r"\textless{}"),
            '>' => escaped.push_str(r"\textgreater{}"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::{escape_latex, tied};

    #[test]
    fn units_minus_signs_and_windows_stay_with_their_words() {
        for (text, expected) in [
            ("accuracy − teacher's, points (95 %)", "accuracy −~teacher's, points (95~%)"),
            ("student gated n=auto tree=32, 4.5 ms", "student gated~n=auto tree=32, 4.5~ms"),
            ("54.0 % (95 %: −1.2 to 3.4), 8.00 s.", "54.0~% (95~%: −1.2 to 3.4), 8.00~s."),
            (" a  b ", " a  b "),
        ] {
            assert_eq!(tied(text).replace('\u{a0}', "~"), expected);
        }
    }

    #[test]
    fn characters_that_latex_would_interpret_are_escaped() {
        assert_eq!(
            escape_latex("50 % of a_b & {c} \\d ~^#$ <e>\n|"),
            r"50 \% of a\_b \& \{c\} \textbackslash{}d \textasciitilde{}\textasciicircum{}\#\$ \textless{}e\textgreater{} \textbar{}"
        );
    }
}
