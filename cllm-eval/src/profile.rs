//! `profile`: fast-forwarded and stationary tokens of collected trajectories, side by side (CLLM,
//! table 3).

use std::path::{Path, PathBuf};

use cllm_core::progress::count;
use cllm_core::trajectory::{FinishReason, INCOMPLETE_DATA_SET, Profile, Reader, RowChunk, Trajectory};
use cllm_core::{Error, Result, interrupt, progress};
use rayon::prelude::*;
use serde::Serialize;

use crate::records::SCHEMA_VERSION;
use crate::statistics::ratio;
use crate::table::format_number;
use crate::terminal;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Profiles {
    pub schema_version: u32,
    /// In the order given.
    pub sets: Vec<SetProfile>,
}

/// The profile of one data set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SetProfile {
    /// The name given, or else the folder.
    pub name: String,
    pub path: PathBuf,
    /// Tokens per block.
    pub n: usize,
    /// Number of rows left out because `augment` changed them.
    pub augmented_rows: usize,
    /// All blocks.
    pub all: BlockFigures,
    /// The blocks that the answer fills.
    pub whole_blocks: BlockFigures,
    /// The blocks of answers that ended on their own.
    pub eos: BlockFigures,
    /// The blocks of answers that reached the length limit.
    pub length: BlockFigures,
    /// Means of `all` over those of the first set. None for the first set, and if n differs.
    pub ratio_to_first: Option<BlockMeans>,
}

/// Figures of some blocks. Tokens after the end of an answer never count.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct BlockFigures {
    pub blocks: usize,
    /// Tokens of answers in the blocks.
    pub tokens: usize,
    #[serde(flatten)]
    pub means: BlockMeans,
}

/// Means over blocks, or ratios of such means.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct BlockMeans {
    /// Tokens that an iteration adds to the correct prefix: at least one, as the paper counts.
    pub fast_forwarded: Option<f64>,
    /// Tokens per block that iterations added beyond one each.
    pub beyond_one_per_block: Option<f64>,
    /// Tokens per block that were correct while a token before them was wrong, and stayed correct.
    pub stationary: Option<f64>,
    pub iterations_per_block: Option<f64>,
    /// Tokens over all forwards, including those that confirm or open a block. None for blocks
    /// without their whole answers.
    pub tokens_per_forward: Option<f64>,
}

/// Sums over rows.
#[derive(Default)]
struct Sums {
    augmented_rows: usize,
    whole_blocks: Profile,
    eos: AnswerSums,
    length: AnswerSums,
}

/// Sums over whole answers.
#[derive(Clone, Copy, Default)]
struct AnswerSums {
    blocks: Profile,
    num_forwards: usize,
}

/// Profiles data sets, each given as `FOLDER` or `NAME=FOLDER`.
///
/// # Errors
/// When one cannot be read, or all of its rows are augmented.
pub fn profile(sets: &[String]) -> Result<Profiles> {
    let mut sets: Vec<SetProfile> = sets.iter().map(|set| profile_set(set)).collect::<Result<_>>()?;
    if let Some((first, others)) = sets.split_first_mut() {
        for other in others.iter_mut().filter(|other| other.n == first.n) {
            other.ratio_to_first = Some(other.all.means.over(&first.all.means));
        }
    }
    Ok(Profiles { schema_version: SCHEMA_VERSION, sets })
}

fn profile_set(argument: &str) -> Result<SetProfile> {
    let (name, path) = match argument.split_once('=') {
        Some((name, path)) if !Path::new(argument).exists() => (name, path),
        _ => (argument, argument),
    };
    let path = PathBuf::from(path);
    let reader = Reader::open_incomplete(&path)?;
    if !reader.is_complete() {
        progress::log(format!("{} {INCOMPLETE_DATA_SET}", path.display()));
    }
    let sums = Sums::read(&reader)?;
    let all = sums.eos.plus(sums.length);
    if sums.augmented_rows > 0 {
        progress::log(format!("{}: left out {}", path.display(), count(sums.augmented_rows, "augmented row")));
    }
    if all.blocks.num_blocks == 0 {
        return Err(Error::file(&path, "every row is augmented: profile the data set that `cllm-data collect` wrote"));
    }
    Ok(SetProfile {
        name: name.to_owned(),
        n: reader.provenance().n,
        augmented_rows: sums.augmented_rows,
        all: BlockFigures::from_answers(all),
        whole_blocks: BlockFigures::new(&sums.whole_blocks, None),
        eos: BlockFigures::from_answers(sums.eos),
        length: BlockFigures::from_answers(sums.length),
        ratio_to_first: None,
        path,
    })
}

impl Profiles {
    /// Formats a table for each data set, followed by the meaning of the columns.
    pub fn text(&self) -> String {
        const HEADS: [&str; 7] = [
            "blocks of",
            "blocks",
            "fast-\nforwarded/\niteration",
            "beyond\none/\nblock",
            "stationary/\nblock",
            "iterations/\nblock",
            "tokens per\nforward",
        ];
        let table =
            |set: &SetProfile| format!("{}, n = {}\n{}", set.name, set.n, terminal::table(&HEADS, 1, set.rows()));
        let tables: String = self.sets.iter().map(table).collect();
        let meaning = "fast-forwarded: tokens that an iteration adds to the correct prefix, at least one (CLLM, table 3); stationary: \
               tokens that are correct while a token before them is wrong, and stay correct; tokens after the end of an \
               answer never count";
        tables + &terminal::wrap(meaning)
    }
}

impl SetProfile {
    fn rows(&self) -> Vec<Vec<String>> {
        let groups = [
            ("all answers", &self.all),
            ("whole blocks", &self.whole_blocks),
            ("answers ended by EOS", &self.eos),
            ("answers cut at the limit", &self.length),
        ];
        let mut rows: Vec<_> = groups
            .into_iter()
            .filter(|(_, figures)| figures.blocks > 0)
            .map(|(group, figures)| Self::row(group, figures.blocks.to_string(), &figures.means, ""))
            .collect();
        if let Some(ratios) = &self.ratio_to_first {
            rows.push(Self::row("ratio to the first set", String::new(), ratios, "x"));
        }
        rows
    }

    fn row(group: &str, blocks: String, means: &BlockMeans, unit: &str) -> Vec<String> {
        let BlockMeans { fast_forwarded, beyond_one_per_block, stationary, iterations_per_block, tokens_per_forward } =
            *means;
        let means = [fast_forwarded, beyond_one_per_block, stationary, iterations_per_block, tokens_per_forward];
        let mut cells = vec![group.to_owned(), blocks];
        cells.extend(means.map(|mean| format_number(mean, 2, unit)));
        cells
    }
}

impl Sums {
    /// Sums over all rows of a data set, in parallel.
    fn read(reader: &Reader) -> Result<Self> {
        let of_chunk = |chunk: &RowChunk| {
            let mut sums = Sums::default();
            for row in reader.chunk_rows(chunk) {
                interrupt::check()?;
                sums.count(&row?);
            }
            Ok(sums)
        };
        let of_chunks = reader.row_chunks().par_iter().map(of_chunk).collect::<Result<Vec<Sums>>>()?;
        Ok(of_chunks.into_iter().fold(Sums::default(), Sums::plus))
    }

    fn count(&mut self, row: &Trajectory) {
        // Augmented states never occurred in decoding.
        if row.augmented.is_some() {
            self.augmented_rows += 1;
            return;
        }
        let answer = match row.finish_reason {
            FinishReason::Eos => &mut self.eos,
            FinishReason::Length => &mut self.length,
        };
        answer.num_forwards += row.num_forwards();
        for block in row.block_profiles() {
            answer.blocks += block.profile;
            if block.is_whole {
                self.whole_blocks += block.profile;
            }
        }
    }

    fn plus(mut self, other: Sums) -> Self {
        self.augmented_rows += other.augmented_rows;
        self.whole_blocks += other.whole_blocks;
        self.eos = self.eos.plus(other.eos);
        self.length = self.length.plus(other.length);
        self
    }
}

impl AnswerSums {
    fn plus(mut self, other: AnswerSums) -> Self {
        self.blocks += other.blocks;
        self.num_forwards += other.num_forwards;
        self
    }
}

impl BlockFigures {
    fn from_answers(answers: AnswerSums) -> Self {
        Self::new(&answers.blocks, Some(answers.num_forwards))
    }

    fn new(profile: &Profile, num_forwards: Option<usize>) -> Self {
        let means = BlockMeans {
            fast_forwarded: profile.fast_forwarded_per_iteration(),
            beyond_one_per_block: profile.beyond_one_per_block(),
            stationary: profile.stationary_per_block(),
            iterations_per_block: profile.iterations_per_block(),
            tokens_per_forward: ratio(profile.num_tokens as f64, num_forwards.map(|number| number as f64)),
        };
        BlockFigures { blocks: profile.num_blocks, tokens: profile.num_tokens, means }
    }
}

impl BlockMeans {
    fn over(&self, first: &BlockMeans) -> BlockMeans {
        BlockMeans {
            fast_forwarded: ratio(self.fast_forwarded, first.fast_forwarded),
            beyond_one_per_block: ratio(self.beyond_one_per_block, first.beyond_one_per_block),
            stationary: ratio(self.stationary, first.stationary),
            iterations_per_block: ratio(self.iterations_per_block, first.iterations_per_block),
            tokens_per_forward: ratio(self.tokens_per_forward, first.tokens_per_forward),
        }
    }
}
