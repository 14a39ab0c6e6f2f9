//! `profile`: fast-forwarded and stationary tokens of collected trajectories beside each other (CLLM, table 3).

use std::path::{Path, PathBuf};

use cllm_core::trajectory::{FinishReason, INCOMPLETE_DATA_SET, Profile, Reader, Trajectory};
use cllm_core::{Error, Result, interrupt, progress};
use rayon::prelude::*;
use serde::Serialize;

use crate::records::SCHEMA_VERSION;
use crate::statistics::ratio;
use crate::table::{self, number};

/// Profiles of data sets; each but the first has its ratios to the first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Profiles {
    /// Version of this document.
    pub schema_version: u32,
    /// In the order given.
    pub sets: Vec<SetProfile>,
}

/// The profile of a data set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SetProfile {
    /// As given, or else its folder.
    pub name: String,
    /// Its folder.
    pub path: PathBuf,
    /// Tokens of a block.
    pub n: usize,
    /// Rows that `augment` changed, and that therefore were left out.
    pub augmented_rows: usize,
    /// Over all blocks.
    pub all: Figures,
    /// Over the blocks that the answer fills.
    pub whole_blocks: Figures,
    /// Over the answers that ended by themselves.
    pub eos: Figures,
    /// Over those that reached the length limit.
    pub length: Figures,
    /// Of `all` to that of the first set; none in the first, and where n is another.
    pub ratio_to_first: Option<Means>,
}

/// Figures of some blocks. Tokens after the end of an answer count nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Figures {
    /// Blocks.
    pub blocks: usize,
    /// Tokens of answers in them.
    pub tokens: usize,
    /// What they come to.
    #[serde(flatten)]
    pub means: Means,
}

/// Means over blocks, or the ratios of such means.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Means {
    /// Tokens that an iteration adds to the right prefix: the one that every iteration adds and what is beyond it, as the paper
    /// counts.
    pub fast_forwarded: Option<f64>,
    /// Tokens of a block that were added beyond one an iteration.
    pub beyond_one_per_block: Option<f64>,
    /// Tokens of a block that were right while one before them was wrong, and stayed right.
    pub stationary: Option<f64>,
    /// Iterations of a block.
    pub iterations_per_block: Option<f64>,
    /// Tokens over all forwards, those that confirm and open blocks among them; none for blocks apart from their answers.
    pub tokens_per_forward: Option<f64>,
}

/// Sums over rows.
#[derive(Default)]
struct Sums {
    augmented_rows: usize,
    whole_blocks: Profile,
    /// Of the answers that ended by themselves, then of those that reached the limit; each with its forwards.
    by_finish: [(Profile, usize); 2],
}

/// Profiles data sets, each `FOLDER` or `NAME=FOLDER`.
///
/// # Errors
/// When one cannot be read, or has no row as it was decoded.
pub fn profile(sets: &[String]) -> Result<Profiles> {
    let mut sets: Vec<SetProfile> = sets.iter().map(|given| profile_set(given)).collect::<Result<_>>()?;
    if let Some((first, others)) = sets.split_first_mut() {
        for other in others.iter_mut().filter(|other| other.n == first.n) {
            other.ratio_to_first = Some(other.all.means.over(&first.all.means));
        }
    }
    Ok(Profiles { schema_version: SCHEMA_VERSION, sets })
}

impl Profiles {
    /// As people read it in the terminal.
    pub fn text(&self) -> String {
        let heads = [
            "data set",
            "n",
            "of",
            "blocks",
            "fast-forwarded/iteration",
            "beyond one/block",
            "stationary/block",
            "iterations/block",
            "tokens/forward",
        ];
        let mut text = table::drawn(&heads, 3, self.sets.iter().flat_map(SetProfile::rows));
        text += "fast-forwarded: tokens that an iteration adds to the right prefix, at least one (CLLM, table 3); stationary: right \
                 while a token before them was wrong, and right from then on; tokens after the end of an answer count nowhere\n";
        text
    }
}

impl SetProfile {
    fn rows(&self) -> Vec<Vec<String>> {
        let row = |of: &str, blocks: String, figures: &Means, unit: &str| {
            let show = |figure| number(figure, 2, unit);
            let Means { fast_forwarded, beyond_one_per_block, stationary, iterations_per_block, tokens_per_forward } =
                *figures;
            let figures = [fast_forwarded, beyond_one_per_block, stationary, iterations_per_block, tokens_per_forward];
            let mut cells = vec![self.name.clone(), self.n.to_string(), of.to_owned(), blocks];
            cells.extend(figures.map(show));
            cells
        };
        let groups = [
            ("all answers", &self.all),
            ("whole blocks", &self.whole_blocks),
            ("ended by EOS", &self.eos),
            ("cut at the limit", &self.length),
        ];
        let mut rows: Vec<_> = groups
            .into_iter()
            .filter(|(_, figures)| figures.blocks > 0)
            .map(|(of, figures)| row(of, figures.blocks.to_string(), &figures.means, ""))
            .collect();
        rows.extend(self.ratio_to_first.iter().map(|ratios| row("all over the first", String::new(), ratios, "x")));
        rows
    }
}

fn profile_set(given: &str) -> Result<SetProfile> {
    let (name, path) = match given.split_once('=') {
        Some((name, path)) if !Path::new(given).exists() => (name, path),
        _ => (given, given),
    };
    let path = PathBuf::from(path);
    let reader = Reader::open_incomplete(&path)?;
    if !reader.is_complete() {
        progress::log(format!("{} {INCOMPLETE_DATA_SET}", path.display()));
    }
    let sums = |piece| {
        let mut sums = Sums::default();
        for row in reader.chunk_rows(piece) {
            interrupt::check()?;
            sums.count(&row?);
        }
        Ok(sums)
    };
    let of_pieces = reader.row_chunks().par_iter().map(sums).collect::<Result<Vec<Sums>>>()?;
    let mut sum = Sums::default();
    of_pieces.iter().for_each(|piece| sum.add(piece));
    let [(mut all, mut forwards), limited] = sum.by_finish;
    all += limited.0;
    forwards += limited.1;
    if sum.augmented_rows > 0 {
        progress::log(format!("{}: {} augmented rows were left out", path.display(), sum.augmented_rows));
    }
    if all.blocks == 0 {
        let message =
            "holds no row as it was decoded: profile what `cllm-data collect` wrote, not what augment made of it";
        return Err(Error::file(&path, message));
    }
    let [eos, length] = sum.by_finish.map(|(profile, forwards)| Figures::of(&profile, Some(forwards)));
    Ok(SetProfile {
        name: name.to_owned(),
        n: reader.provenance().n,
        augmented_rows: sum.augmented_rows,
        all: Figures::of(&all, Some(forwards)),
        whole_blocks: Figures::of(&sum.whole_blocks, None),
        eos,
        length,
        ratio_to_first: None,
        path,
    })
}

impl Sums {
    fn count(&mut self, row: &Trajectory) {
        // Augmented states never occurred in decoding.
        if row.augmented.is_some() {
            self.augmented_rows += 1;
            return;
        }
        let (profile, forwards) = &mut self.by_finish[usize::from(row.finish_reason == FinishReason::Length)];
        *forwards += row.num_forwards();
        for (of_block, whole) in row.block_profiles() {
            *profile += of_block;
            if whole {
                self.whole_blocks += of_block;
            }
        }
    }

    fn add(&mut self, other: &Sums) {
        self.augmented_rows += other.augmented_rows;
        self.whole_blocks += other.whole_blocks;
        for ((profile, forwards), (more, forwards_more)) in self.by_finish.iter_mut().zip(&other.by_finish) {
            *profile += *more;
            *forwards += forwards_more;
        }
    }
}

impl Figures {
    fn of(profile: &Profile, forwards: Option<usize>) -> Self {
        let means = Means {
            fast_forwarded: profile.fast_forwarded_per_iteration(),
            beyond_one_per_block: profile.beyond_one_per_block(),
            stationary: profile.stationary_per_block(),
            iterations_per_block: profile.iterations_per_block(),
            tokens_per_forward: ratio(profile.tokens as f64, forwards.map(|forwards| forwards as f64)),
        };
        Figures { blocks: profile.blocks, tokens: profile.tokens, means }
    }
}

impl Means {
    fn over(&self, first: &Means) -> Means {
        Means {
            fast_forwarded: ratio(self.fast_forwarded, first.fast_forwarded),
            beyond_one_per_block: ratio(self.beyond_one_per_block, first.beyond_one_per_block),
            stationary: ratio(self.stationary, first.stationary),
            iterations_per_block: ratio(self.iterations_per_block, first.iterations_per_block),
            tokens_per_forward: ratio(self.tokens_per_forward, first.tokens_per_forward),
        }
    }
}
