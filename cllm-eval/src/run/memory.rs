//! Peak GPU memory of each strategy at batch 1.

use cllm_core::decode::Strategy;
use cllm_core::{Result, interrupt};

use super::models::LoadedModel;
use super::session::Session;
use super::timing;

/// Measures the memory of one model with the longest of the timed prompts; does nothing on the CPU.
/// Timing cannot measure it, because its decoders have room for every strategy, and because CUDA
/// graphs allocate nothing when they are replayed.
///
/// # Errors
/// When decoding fails.
pub(super) fn measure_batch1(session: &Session<'_>, model: &mut LoadedModel, strategies: &[Strategy]) -> Result<()> {
    let num_tokens = |&index: &usize| model.prompts.get(index).num_tokens();
    let Some(longest) = session.timed.iter().copied().max_by_key(num_tokens) else { return Ok(()) };
    if !session.device.is_cuda() {
        return Ok(());
    }
    for &strategy in strategies {
        interrupt::check()?;
        let answer =
            || timing::time_answer(session, model, &mut model.decoder(1, &[strategy])?, strategy, longest).map(drop);
        // The first answer may leave workspaces, which the others would not pay for.
        answer()?;
        if let Some(peak_bytes) = model.peak_memory_of(answer)? {
            model.batch1_peak_bytes.push((strategy, peak_bytes));
        }
    }
    Ok(())
}
