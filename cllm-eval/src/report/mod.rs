//! `report`: what people send around, drawn from results and their samples: one HTML page that needs nothing else, Markdown, LaTeX
//! tables and a model card.

mod card;
mod charts;
mod example;
mod model_card;
mod overview;
mod section;

use std::path::{Path, PathBuf};

use cllm_core::{Error, Result, atomic_file};
use minijinja::value::Serde;
use minijinja::{Environment, context};

use crate::records::{Records, SAMPLES};
use crate::results::{RESULTS, Results};
use crate::table::HEADS;
use model_card::{decoding, front_matter};
use section::Section;

/// What a report draws of one run.
struct Run {
    /// Benchmark and split, and its folder where runs that are drawn together have the same.
    title: String,
    results: Results,
    /// Its answers and timings, where the file lies beside the results.
    records: Option<Records>,
}

/// Draws the reports of some runs into `output`, or beside the first of them, and says what was written.
///
/// # Errors
/// When a file is missing or is no results file.
pub fn report(results: &[PathBuf], output: Option<&Path>) -> Result<Vec<PathBuf>> {
    let files: Vec<PathBuf> =
        results.iter().map(|path| if path.is_dir() { path.join(RESULTS) } else { path.clone() }).collect();
    let mut runs: Vec<Run> = files.iter().map(|path| Run::read(path)).collect::<Result<_>>()?;
    let titles: Vec<String> = runs.iter().map(|run| run.title.clone()).collect();
    for (run, file) in runs.iter_mut().zip(&files) {
        if titles.iter().filter(|title| **title == run.title).count() > 1 {
            run.title += &format!(" / {}", file.parent().unwrap_or(Path::new("")).display());
        }
    }
    let folder = match output {
        Some(folder) => folder.to_owned(),
        None => files.first().and_then(|file| file.parent()).unwrap_or(Path::new(".")).to_owned(),
    };
    let sections: Vec<Section> = runs.iter().map(Section::of).collect::<Result<_>>()?;
    let values = context! {
        sections => minijinja::Value::from(Serde(&sections)),
        heads => HEADS,
        overview_heads => overview::HEADS,
        overview => overview::rows(&runs),
        decoding => decoding(&runs),
        front_matter => front_matter(&runs)?,
    };
    let environment = environment();
    let mut written = Vec::new();
    // The ending of a name decides whether minijinja escapes what it is given.
    for (name, template) in [
        ("report.md", include_str!("../../templates/report.md")),
        ("report.html", include_str!("../../templates/report.html")),
        ("report.tex", include_str!("../../templates/report.tex")),
        ("model-card.md", include_str!("../../templates/model-card.md")),
    ] {
        let text = environment
            .render_named_str(name, template, &values)
            .map_err(|error| Error::file(folder.join(name), format!("cannot be drawn: {error:#}")))?;
        atomic_file::write(&folder.join(name), text.as_bytes())?;
        written.push(folder.join(name));
    }
    Ok(written)
}

impl Run {
    fn read(path: &Path) -> Result<Self> {
        let results = Results::read(path)?;
        let samples = path.with_file_name(SAMPLES);
        let records = if samples.exists() { Some(Records::read(&samples)?) } else { None };
        let title = format!("{} / {}", results.benchmark.name(), results.split);
        Ok(Run { title, results, records })
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.add_filter("one_line", |text: &str| text.replace(['\n', '\r'], " ").replace('|', "\\|"));
    environment.add_filter("block", |text: &str| format!("    {}", text.replace('\n', "\n    ")));
    environment.add_filter("tex", tex);
    environment
}

/// `text` as LaTeX shows it.
fn tex(text: &str) -> String {
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
    use super::tex;

    #[test]
    fn what_latex_reads_as_commands_is_escaped() {
        assert_eq!(
            tex("50 % of a_b & {c} \\d ~^#$ <e>\n|"),
            r"50 \% of a\_b \& \{c\} \textbackslash{}d \textasciitilde{}\textasciicircum{}\#\$ \textless{}e\textgreater{} \textbar{}"
        );
    }
}
