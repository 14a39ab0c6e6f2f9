//! Completes a data set: writes its card, a README.md with the front matter of the Hugging Face
//! Hub, and marks the manifest as complete. Every verb that makes a data set ends here.

use cllm_core::printable::to_markdown;
use cllm_core::trajectory::{Manifest, Writer};
use cllm_core::{Result, atomic_file};

/// Completes a data set and returns its number of rows.
pub(crate) fn finish_with_card(writer: Writer) -> Result<usize> {
    // The card is written first: a later run that finds a complete manifest would not write a
    // missing card.
    atomic_file::write(&writer.folder().join("README.md"), card(writer.manifest()).as_bytes())?;
    Ok(writer.finish()?.num_rows())
}

fn card(manifest: &Manifest) -> String {
    let num_rows = manifest.num_rows();
    let provenance = &manifest.provenance;
    let size = size_category(num_rows);
    let thoughts = provenance
        .thought_closing
        .as_ref()
        .map_or(String::new(), |closing| format!(" and thoughts closed after {} tokens", closing.max_thinking_tokens));
    let steps: Vec<_> = provenance.steps.iter().map(|step| format!("- {}", to_markdown(step))).collect();
    format!(
        "---\npretty_name: Jacobi trajectories\ntask_categories:\n- text-generation\ntags:\n- cllm\n- jacobi-decoding\n\
         size_categories:\n- {size}\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    \
         path: data/*.parquet\n---\n\
         # Jacobi trajectories\n\n{num_rows} greedy responses of one teacher with every state of their Jacobi decoding, \
         in blocks of {} tokens, with at most {} tokens per response{thoughts}.\n\n- teacher: {}\n- fingerprint of its \
         config and weights: `{}`\n- fingerprint of its tokenizer: `{}`\n- seed: {}\n- toolkit: cllm {}\n\nSteps:\n\n{}\n",
        provenance.n,
        provenance.max_new_tokens,
        teacher(provenance.teacher_name.as_deref(), provenance.teacher_base.as_deref()),
        provenance.teacher,
        provenance.tokenizer,
        provenance.seed,
        provenance.toolkit,
        steps.join("\n")
    )
}

/// The name of a teacher and of the model that it was fine-tuned from, with the page of what came
/// from the Hub.
fn teacher(name: Option<&str>, base: Option<&str>) -> String {
    let link = |name: &str| match name {
        id if id.contains('/') => format!("[{id}](https://huggingface.co/{id})"),
        name => name.to_owned(),
    };
    let base = base.map_or_else(String::new, |base| format!(", fine-tuned from {}", link(base)));
    name.map_or_else(|| "not recorded".to_owned(), link) + &base
}

/// The Hub's name for a number of rows.
fn size_category(num_rows: usize) -> &'static str {
    match num_rows {
        0..1_000 => "n<1K",
        1_000..10_000 => "1K<n<10K",
        10_000..100_000 => "10K<n<100K",
        100_000..1_000_000 => "100K<n<1M",
        1_000_000..10_000_000 => "1M<n<10M",
        10_000_000..100_000_000 => "10M<n<100M",
        100_000_000..1_000_000_000 => "100M<n<1B",
        _ => "n>1B",
    }
}

#[cfg(test)]
mod tests {
    use super::{size_category, teacher};

    #[test]
    fn the_card_names_the_teacher_and_its_base() {
        let link = "[org/name](https://huggingface.co/org/name)";
        assert_eq!(teacher(Some("org/name"), None), link);
        assert_eq!([teacher(Some("tiny"), None), teacher(None, None)], ["tiny", "not recorded"]);
        assert_eq!(teacher(Some("sums"), Some("org/name")), format!("sums, fine-tuned from {link}"));
    }

    #[test]
    fn size_categories_are_named_as_on_the_hub() {
        for (num_rows, name) in [
            (999, "n<1K"),
            (1_000, "1K<n<10K"),
            (999_999, "100K<n<1M"),
            (1_000_000, "1M<n<10M"),
            (99_999_999, "10M<n<100M"),
            (2_000_000_000, "n>1B"),
        ] {
            assert_eq!(size_category(num_rows), name, "{num_rows}");
        }
    }
}
