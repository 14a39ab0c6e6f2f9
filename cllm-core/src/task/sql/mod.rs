//! Scores queries by what they give on SQLite databases, as the official judge of Spider does
//! (`exec_eval.py` of <https://github.com/taoyds/test-suite-sql-eval>, without `--plug_value`).
//!
//! Where that judge departs from its own definition, this one keeps to the definition: equal numbers
//! are equal, whatever their type (1025 and 1025.0) and the rounding of an average (11.35 and
//! 11.350000000000001); strings are never rewritten.

mod databases;
mod extract;
mod lexer;
mod rewrite;

use std::ops::Range;

pub(super) use databases::Databases;

use super::verdict::Verdict;
use crate::{Result, interrupt};
use extract::find_query;
use rewrite::{normalize, without_distinct};

/// The verdicts by two rules: the official judge removes `DISTINCT` from both queries unless told to
/// keep it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Verdicts {
    pub(super) ignore_distinct: Verdict,
    pub(super) keep_distinct: Verdict,
}

/// Compares the results of the answered query and the reference on every database of a suite, which
/// have one schema: those with these indices. A reference that does not run leaves the answer
/// unscored.
///
/// # Errors
/// When queries cannot be run, or a signal asked this process to stop.
pub(super) fn compare(databases: &Databases, suite: Range<usize>, reference: &str, answer: &str) -> Result<Verdicts> {
    // What fails here fails again below.
    let accepts = |query: &str| databases.accepts(suite.start, &normalize(query)).unwrap_or(false);
    let query = |text: &str| find_query(text, accepts).map(|query| normalize(&query));
    let verdict = |reference: &str, answer: Option<&str>| verdict(databases, suite.clone(), reference, answer);
    let Some(reference) = query(reference) else {
        interrupt::check()?;
        return Ok(Verdicts { ignore_distinct: Verdict::Unscored, keep_distinct: Verdict::Unscored });
    };
    let answer = query(answer);
    let keep_distinct = verdict(&reference, answer.as_deref())?;
    let (bare_reference, bare_answer) = (without_distinct(&reference), answer.as_deref().map(without_distinct));
    let ignore_distinct = if (&bare_reference, &bare_answer) == (&reference, &answer) {
        keep_distinct
    } else {
        verdict(&bare_reference, bare_answer.as_deref())?
    };
    Ok(Verdicts { ignore_distinct, keep_distinct })
}

fn verdict(databases: &Databases, suite: Range<usize>, reference: &str, answer: Option<&str>) -> Result<Verdict> {
    for database in suite {
        match databases.same_result(database, reference, answer)? {
            None => return Ok(Verdict::Unscored),
            Some(false) => return Ok(Verdict::Incorrect),
            Some(true) => {}
        }
    }
    Ok(Verdict::Correct)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn databases(scripts: &[&str]) -> Databases {
        let scripts = scripts.iter().map(|script| (*script).to_owned()).collect();
        Databases::from_scripts(scripts, std::time::Duration::from_secs(5)).unwrap()
    }

    const PETS: &str = "CREATE TABLE pet (name, age, weight REAL);
        INSERT INTO pet VALUES ('Ada', 3, 11.35), ('Bo', 5, 4.0), ('Bo', 9, 2.5), (NULL, 5, NULL);";

    #[track_caller]
    fn assert_verdicts(gold: &str, answer: &str, is_correct: bool, is_correct_with_distinct: bool) {
        let expected = Verdicts {
            ignore_distinct: Verdict::from_correct(is_correct),
            keep_distinct: Verdict::from_correct(is_correct_with_distinct),
        };
        assert_eq!(compare(&databases(&[PETS]), 0..1, gold, answer).unwrap(), expected, "{gold} | {answer}");
    }

    #[test]
    fn answers_are_taken_out_of_texts_and_compared_as_the_official_judge_does() {
        for (gold, answer) in [
            ("SELECT name, age FROM pet", "SELECT age, name FROM pet"),
            ("SELECT name FROM pet WHERE age >= 5", "SELECT name FROM pet WHERE age > = 5"),
            ("SELECT name FROM pet WHERE age != 5", "SELECT name FROM pet WHERE age < > 5"),
            ("SELECT count(*) FROM pet", "```sql\n-- count all; no filter\nSELECT count(*) FROM pet;\n```"),
            ("SELECT count(*) FROM pet", "-- the shop's pets\nSELECT count(*) FROM pet;\nThat counts them."),
            ("SELECT count(*) FROM pet", "```mysql\nSELECT count(*) FROM pet\n```"),
            ("SELECT count(*) FROM pet", "~~~\nSELECT count(*) FROM pet\n~~~"),
            ("SELECT count(*) FROM pet", "SQL: SELECT count(*) FROM pet"),
            ("SELECT count(*) FROM pet", "The query is:\nSELECT count(*) FROM pet\n\nIt counts all rows."),
            ("SELECT count(*) FROM pet", "```sql\nSELECT 1\n```\nCorrection:\n```sql\nSELECT count(*) FROM pet\n```"),
            ("SELECT floor(avg(age)) FROM pet", "SELECT floor(avg(age)) FROM pet"),
            ("SELECT 2020 - age FROM pet", "SELECT YEAR(CURDATE()) - age FROM pet"),
            ("SELECT 1025", "SELECT 1025.0"),
            ("SELECT 11.35, 'a'", "SELECT 'a', 11.350000000000001"),
            ("SELECT sum(weight) FROM pet", "SELECT 2.5 + 11.35 + 4"),
            ("SELECT name FROM pet WHERE age > 50", "SELECT age, weight FROM pet WHERE age > 99"),
            ("SELECT name FROM pet", "SELECT p.name AS who FROM pet AS p ORDER BY who DESC"),
            ("SELECT name, age FROM pet ORDER BY age, weight", "SELECT age, name FROM pet ORDER BY age, weight"),
        ] {
            assert_verdicts(gold, answer, true, true);
        }
    }

    #[test]
    fn other_results_are_incorrect() {
        for (gold, answer) in [
            ("SELECT name FROM pet", "SELECT name FROM pet LIMIT 3"),
            ("SELECT name FROM pet", "SELECT name FROM pet UNION SELECT name FROM pet"),
            ("SELECT name, age FROM pet", "SELECT name FROM pet"),
            ("SELECT name, name FROM pet", "SELECT name, age FROM pet"),
            ("SELECT age FROM pet ORDER BY age", "SELECT age FROM pet ORDER BY age DESC"),
            ("SELECT count(*) FROM pet", "SELECT '4'"),
            ("SELECT count(*) FROM pet", "It is 4."),
            ("SELECT count(*) FROM pet", "EXPLAIN SELECT count(*) FROM pet"),
            ("SELECT count(*) FROM pet", ""),
            ("SELECT name FROM pet WHERE age > 99", "SELECT name FROM pet WHERE age > 8"),
        ] {
            assert_verdicts(gold, answer, false, false);
        }
    }

    #[test]
    fn distinct_decides_by_one_rule_alone() {
        assert_verdicts("SELECT name FROM pet", "SELECT DISTINCT name FROM pet", true, false);
        assert_verdicts("SELECT count(DISTINCT name) FROM pet", "SELECT count(name) FROM pet", true, false);
        assert_verdicts("SELECT DISTINCT name FROM pet", "SELECT name FROM pet GROUP BY name", false, true);
        assert_verdicts("SELECT DISTINCT name FROM pet", "SELECT DISTINCT name FROM pet", true, true);
        assert_verdicts("SELECT DISTINCT weight FROM pet", "SELECT weight FROM pet", true, true);
        assert_verdicts("SELECT name IS DISTINCT FROM 'Bo' FROM pet", "SELECT name IS NOT 'Bo' FROM pet", true, true);
    }

    #[test]
    fn every_database_of_a_suite_must_agree() {
        let other = "CREATE TABLE pet (name, age, weight REAL); INSERT INTO pet VALUES ('Cy', 3, 1.0), ('Di', 9, 2.0);";
        let suite = databases(&[PETS, other]);
        let (gold, lucky) = ("SELECT max(age) FROM pet WHERE name = 'Bo'", "SELECT max(age) FROM pet");
        let verdict = |gold: &str, answer: &str| compare(&suite, 0..2, gold, answer).unwrap().ignore_distinct;
        assert_verdicts(gold, lucky, true, true);
        assert_eq!(verdict(gold, lucky), Verdict::Incorrect);
        assert_eq!(verdict(gold, gold), Verdict::Correct);
        assert_eq!(verdict("SELECT owner FROM pet", "SELECT 22"), Verdict::Unscored);
        // A reference that fails anywhere says nothing: here a sum is beyond an integer's range.
        let failing = databases(&[PETS, &PETS.replace("9, 2.5", "9223372036854775807, 2.5")]);
        let verdicts = compare(&failing, 0..2, "SELECT sum(age) FROM pet", "SELECT 22").unwrap();
        assert_eq!(verdicts.ignore_distinct, Verdict::Unscored);
    }
}
