//! `augment`: which tokens it changes, and the same result for the same seed.

use cllm_testing::programs::path;

use crate::fixtures::{N, row, rows, run, write_data_set};

#[test]
fn augment_keeps_the_first_wrong_token_and_the_fixed_point() {
    let response: Vec<i32> = (10..49).chain([0]).collect();
    let input = write_data_set(&[row("a", &response), row("b", &response)]);
    let (once, again) = (path(input.path(), "once"), path(input.path(), "again"));
    for output in [&once, &again] {
        run(&["augment", &format!("input={}", input.path().display()), &format!("output={output}"), "seed=5"])
            .success();
    }
    let changed = rows(&once);
    assert_eq!(changed, rows(&again));
    let mut num_changed = 0;
    for (before, after) in rows(&input.path().display().to_string()).iter().zip(&changed) {
        for (index, (old, new)) in before.blocks.iter().zip(&after.blocks).enumerate() {
            let fixed_point = old.states.last().unwrap();
            assert_eq!(new.states.last(), Some(fixed_point));
            for (state, (old, new)) in old.states.iter().zip(&new.states).enumerate() {
                let first_wrong = old.iter().zip(fixed_point).position(|(a, b)| a != b);
                assert_eq!(new.iter().zip(fixed_point).position(|(a, b)| a != b), first_wrong);
                assert!((0..N).all(|at| new[at] == old[at] || new[at] == fixed_point[at]));
                assert_eq!(after.augmented.as_ref().unwrap()[index][state], old != new);
                num_changed += usize::from(old != new);
            }
        }
    }
    assert!(num_changed > 0);
}
