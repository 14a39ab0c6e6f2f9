//! HumanEval and MBPP: verdicts agree with the official evaluators, and no code runs unless asked.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use cllm_core::checkpoint;
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::prompt_set::{Prompt, Sample};
use cllm_core::sandbox::{Limits, Sandbox};
use cllm_core::task::{ScoreContext, Task, Verdict};
use cllm_core::tokenizer::{self, Tokenizer};
use cllm_core::trajectory::FinishReason;
use cllm_eval::records::Records;
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::made_up::{model, records};
use crate::sandbox::{alone, left_running};
use cllm_testing::programs::{Program, path};

const EVAL: Program = Program("cllm-eval");

fn sandbox() -> Sandbox {
    Sandbox::open().unwrap()
}

fn score(task: Task, sandbox: &Sandbox, sample: &Sample, answer: &str) -> Verdict {
    let by = ScoreContext { sandbox: Some(sandbox), ..ScoreContext::default() };
    task.check_scorable(by, sample).unwrap();
    task.score(by, sample, answer, FinishReason::Eos, false).unwrap().verdict
}

/// A problem like those of HumanEval.
fn largest() -> Sample {
    let prompt = "from typing import List\n\n\ndef largest(numbers: List[int]) -> int:\n    \"\"\" The largest number, 0 if there is none. \"\"\"\n";
    let test = "def check(candidate):\n    assert candidate([]) == 0\n    assert candidate([3, 1]) == 3\n    assert candidate([-2, -1]) == -1\n";
    Sample {
        id: "T/0".to_owned(),
        source: "humaneval/test".to_owned(),
        prompt: Prompt::question(prompt),
        reference: Some("?".to_owned()),
        meta: Some(json!({ "task_id": "T/0", "prompt": prompt, "entry_point": "largest", "test": test })),
    }
}

/// A problem like those of MBPP.
fn mbpp(tests: &[&str], setup: &str) -> Sample {
    Sample {
        id: "mbpp-1".to_owned(),
        source: "mbpp/test".to_owned(),
        prompt: Prompt::question("?"),
        reference: Some("?".to_owned()),
        meta: Some(
            json!({ "task_id": 1, "test_imports": ["import math"], "test_list": tests, "test_setup_code": setup }),
        ),
    }
}

/// Kinds of answers whose verdicts differ from those of the official evaluator, as docs/sandbox.md
/// says.
const DIFFERENT: [&str; 5] = ["3 GiB", "a file of 100 MB", "a socket", "files of the system", "a fence at the end"];

/// Answers of 100 kinds to three problems, and whether they pass `check_correctness(problem,
/// completion, 3.0)` of openai/human-eval (commit 6d43fb98).
#[derive(Deserialize)]
struct Recorded {
    problems: Vec<Value>,
    /// Name of the problem, kind, text, whether it passes.
    answers: Vec<(String, String, String, bool)>,
}

#[test]
fn verdicts_agree_with_the_official_evaluator() {
    let _alone = alone();
    let recorded: Recorded = serde_json::from_str(include_str!("../fixtures/humaneval-verdicts.json")).unwrap();
    assert!(recorded.answers.len() > 250);
    let limits = Limits { cpu_seconds: 3, wall_time: Duration::from_secs(8), ..Limits::default() };
    let sandbox = Sandbox::open_with(Path::new("python3"), limits, None).unwrap();
    let agrees = |(name, kind, answer, passes): &(String, String, String, bool)| {
        let problem = recorded.problems.iter().find(|problem| problem["task_id"] == **name).unwrap();
        let sample = Sample { meta: Some(problem.clone()), ..largest() };
        let verdict = score(Task::Humaneval, &sandbox, &sample, answer);
        let is_same = (verdict == Verdict::Correct) == *passes;
        (is_same == DIFFERENT.contains(&kind.as_str())).then(|| format!("{name}, {kind}: {verdict:?}"))
    };
    let unexpected: Vec<String> = recorded.answers.par_iter().filter_map(agrees).collect();
    assert!(unexpected.is_empty(), "{unexpected:#?}");
}

/// The body of a function that looks for the tests in everything that Python knows of its process,
/// and calls `use(text)` with what looks like them.
const SEARCH: &str = "    import gc, sys
    seen, found = set(), [dict(vars(sys))]
    frame = sys._getframe()
    while frame:
        found.append(frame.f_locals)
        frame = frame.f_back
    found.extend(gc.get_objects())
    for _ in range(3):
        found = [inner for item in found if id(item) not in seen and not seen.add(id(item)) for inner in gc.get_referents(item)]
        for item in found:
            text = item.decode('latin-1') if isinstance(item, bytes) else item
            if isinstance(text, str) and 'candidate([3, 1])' in text and '== 3' in text and 'SECRET' in text:
                use(text)
";

/// Answers that attack the judge instead of solving the problem.
#[test]
fn a_verdict_cannot_be_forged() {
    let (_alone, sandbox) = (alone(), sandbox());
    let Sample { meta: Some(mut meta), .. } = largest() else { panic!("the sample has tests") };
    meta["test"] = json!(format!("{}    # SECRET\n    import colorsys\n", meta["test"].as_str().unwrap()));
    let sample = Sample { meta: Some(meta), ..largest() };
    let correct = "    return max(numbers, default=0)\n";
    assert_eq!(score(Task::Humaneval, &sandbox, &sample, correct), Verdict::Correct);
    // What the harness holds in its frames: the channel of the verdict, and functions to write to it.
    let frames = "    import sys
    frame = sys._getframe()
    while frame:
        names = frame.f_locals
        if 'channel' in names and 'write' in names:
            token = names['read_exactly'](32) if 'read_exactly' in names else b''
            names['write'](names['channel'], b'passed ' + token + b'\\n')
            names['end'](0)
        frame = frame.f_back
";
    let all_descriptors = "    import os
    for descriptor in range(64):
        for text in (b'passed\\n', b'passed ' + b'0' * 32 + b'\\n', (4).to_bytes(8, 'little') + b'true'):
            try: os.write(descriptor, text)
            except OSError: pass
    os._exit(0)
";
    // The judge is the next process, if any.
    let signals = "    import ctypes, os
    for number in range(os.getpid() - 3, os.getpid() + 9):
        if number != os.getpid(): assert ctypes.CDLL(None).kill(number, 9) == -1
    return 7
";
    // A module that the tests import, in the program's own folder.
    let module = "    open('colorsys.py', 'w').write('''
import os
for descriptor in range(64):
    try: os.write(descriptor, b'passed' + bytes([10]))
    except OSError: pass
os._exit(0)
''')
    return max(numbers, default=0)
";
    let of_tests =
        format!("{}    return 7\n", SEARCH.replace("use(text)", "return 0 if not numbers else max(numbers)"));
    for answer in [frames, all_descriptors, signals, &of_tests] {
        assert_eq!(score(Task::Humaneval, &sandbox, &sample, answer), Verdict::Incorrect, "{answer}");
    }
    assert_eq!(
        score(Task::Humaneval, &sandbox, &sample, module),
        Verdict::Correct,
        "the judge has Python's own module"
    );
}

#[test]
fn tests_may_do_with_objects_of_an_answer_what_they_may_do_in_one_process() {
    let (_alone, sandbox) = (alone(), sandbox());
    for (tests, answer) in [
        // Arguments that a function changes.
        (&["x = [3, 1]\nf(x)\nassert x == [1, 3]"][..], "def f(x):\n    x.sort()"),
        (&["x = {1: 2}\nassert f(x) is None and x == {}"], "def f(x):\n    x.clear()"),
        // Objects, iterators and functions that it returns, and those of the tests that it gets.
        (
            &[
                "p = f(1)\np.x += 1\nassert p.x == 2 and p + p == 4 and str(p) == 'P2' and len(p) == 2 and p[0] == 0 and 5 in p",
            ],
            "class P:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return self.x + o.x\n    def __str__(self): return f'P{self.x}'\n    \
             def __len__(self): return self.x\n    def __getitem__(self, i): return i\n    def __contains__(self, x): return x == 5\ndef f(x):\n    return P(x)",
        ),
        (
            &["assert list(f(3)) == [0, 1, 2]", "assert next(f(1)) == 0", "assert sum(f(4)) == 6"],
            "def f(n):\n    yield from range(n)",
        ),
        (&["assert f(lambda x: x + 1, 2) == 3", "assert f(len, 'ab') == 2"], "def f(g, x):\n    return g(x)"),
        (&["assert f(2)(3) == 5"], "def f(x):\n    return lambda y: x + y"),
        // Values of every plain type come as they are.
        (
            &[
                "v = [None, True, 2**70, -1.5, 'é\\ud800', b'\\x00', (1,), {1: {2}}, frozenset([3]), 1j, range(3), float('inf')]\nassert f(v) == v and [type(x) for x in f(v)] == [type(x) for x in v]",
            ],
            "def f(v):\n    return v",
        ),
        (
            &["import collections\nassert f('aab') == collections.Counter('aab') == {'a': 2, 'b': 1}"],
            "import collections\ndef f(x):\n    return collections.Counter(x)",
        ),
        (&["x = f()\nassert x[0] is not None and len(x) == 1"], "def f():\n    x = []\n    x.append(x)\n    return x"),
        // Exceptions, also its own ones.
        (
            &["try:\n    f('x')\n    assert False\nexcept ValueError as error:\n    assert 'invalid' in str(error)"],
            "def f(x):\n    return int(x)",
        ),
        (
            &["try:\n    f()\n    assert False\nexcept Exception as error:\n    assert type(error).__name__ == 'Mine'"],
            "class Mine(Exception): pass\ndef f():\n    raise Mine('x')",
        ),
        // What the tests import is there for the answer, and the reverse.
        (&["assert f(4) == 2 and math.pi > 3"], "def f(x):\n    return math.sqrt(x)"),
        (
            &["assert colorsys.rgb_to_hsv(0, 0, 0)[2] == f() and T.Element('a').tag == 'a'"],
            "import colorsys\nfrom xml.etree import ElementTree as T\ndef f():\n    return 0",
        ),
        // The judge imports nothing after the program had a chance to leave files for it.
        (
            &["import sys\ntry:\n    f()\nexcept Exception:\n    pass\nassert 'colorsys' not in sys.modules"],
            "import types\ndef f():\n    return types.ModuleType('colorsys')",
        ),
    ] {
        assert_eq!(score(Task::Mbpp, &sandbox, &mbpp(tests, ""), answer), Verdict::Correct, "{answer}");
    }
}

#[test]
fn a_chat_answer_is_scored_by_the_code_in_it() {
    let (_alone, sandbox, sample) = (alone(), sandbox(), largest());
    let whole = "def largest(numbers: List[int]) -> int:\n    return max(numbers, default=0)\n";
    for (answer, verdict) in [
        (format!("Here it is:\n```python\n{whole}```\nIt returns the largest."), Verdict::Correct),
        (format!("```python\nlargest([1])\n```\n```python\n{whole}```"), Verdict::Correct),
        (whole.to_owned(), Verdict::Correct),
        (format!("It is:\n{whole}So."), Verdict::Correct),
        (format!("```python\nfrom __future__ import annotations\n{whole}```"), Verdict::Correct),
        (format!("from __future__ import annotations\n{whole}"), Verdict::Correct),
        ("```python\n    return max(numbers, default=0)\n```".to_owned(), Verdict::Correct),
        ("    return max(numbers, default=0)\n```\nThat is all.".to_owned(), Verdict::Correct),
        ("So:\n```\n    return max(numbers, default=0)\n```\nTry\n```\nlargest([1])\n```".to_owned(), Verdict::Correct),
        (format!("```python\n{}```", whole.replace("default=0", "default=1")), Verdict::Incorrect),
    ] {
        assert_eq!(score(Task::Humaneval, &sandbox, &sample, &answer), verdict, "{answer}");
    }
    let by = ScoreContext { sandbox: Some(&sandbox), ..ScoreContext::default() };
    let cut = Task::Humaneval.score(by, &sample, whole, FinishReason::Length, false).unwrap();
    assert_eq!(cut.verdict, Verdict::Incorrect);
    let old = Sample { meta: Some(json!({ "task_id": "T/0", "entry_point": "largest", "test": "" })), ..sample };
    let error = Task::Humaneval.check_scorable(by, &old).unwrap_err().to_string();
    assert!(error.contains("`T/0`") && error.contains("`prompt`") && error.contains("cllm-data prepare"), "{error}");
}

#[test]
fn mbpp_needs_every_assertion_to_pass() {
    let (_alone, sandbox) = (alone(), sandbox());
    let sample = mbpp(&["assert root(9) == 3", "assert math.isclose(root(2), math.sqrt(2))"], "");
    for (answer, verdict) in [
        ("def root(x):\n    return x ** 0.5", Verdict::Correct),
        ("```python\ndef root(x):\n    return x ** 0.5\n```", Verdict::Correct),
        ("def root(x):\n    return 3", Verdict::Incorrect),
        ("def square_root(x):\n    return x ** 0.5", Verdict::Incorrect),
        ("raise SystemExit(0)", Verdict::Incorrect),
        ("", Verdict::Incorrect),
    ] {
        assert_eq!(score(Task::Mbpp, &sandbox, &sample, answer), verdict, "{answer}");
    }
}

#[test]
fn the_setup_of_mbpp_runs_after_the_answer_whose_classes_it_uses() {
    let (_alone, sandbox) = (alone(), sandbox());
    let sample = mbpp(&["assert total(root) == 3"], "root = Node(1)\r\nroot.next = Node(2)");
    let node = "class Node:\n    def __init__(self, value):\n        self.value, self.next = value, None";
    let total = "def total(node):\n    return node.value + total(node.next) if node else 0";
    for answer in [format!("{node}\n\n{total}"), format!("```\n{total}\n```\nwith\n```\n{node}\n```")] {
        assert_eq!(score(Task::Mbpp, &sandbox, &sample, &answer), Verdict::Correct, "{answer}");
    }
    assert_eq!(score(Task::Mbpp, &sandbox, &sample, total), Verdict::Incorrect);
}

#[test]
fn the_code_of_an_answer_is_found_in_its_text() {
    let (_alone, sandbox) = (alone(), sandbox());
    let sample = mbpp(&["assert f(1) == 2"], "");
    let different: Vec<_> = ANSWERS
        .par_iter()
        .filter(|(answer, is_correct)| {
            (score(Task::Mbpp, &sandbox, &sample, answer) == Verdict::Correct) != *is_correct
        })
        .collect();
    assert!(different.is_empty(), "{different:#?}");
}

/// Answers to a test that `f` adds one.
const ANSWERS: &[(&str, bool)] = &[
    // What stands before the last </think> is no answer.
    (
        "first try\n```python\ndef f(x):\n    return x - 1\n```\nno.</think>\n```python\ndef f(x):\n    return x + 1\n```",
        true,
    ),
    ("<think>\n```python\ndef f(x):\n    return x + 1\n```\n</think>\nI cannot.", false),
    // The last definition of what the tests name counts, even if it is broken.
    ("```python\ndef f(x):\n    return x\n```\nBetter:\n```python\ndef f(x):\n    return x + 1\n```", true),
    ("```python\ndef f(x):\n    return x + 1\n```\nBetter:\n```python\ndef f(x):\n    return x\n```", false),
    ("```python\ndef f(x):\n    return x + 1\n```\nBetter:\n```python\ndef f(x):\n    return (x + 1\n```", false),
    ("```python\nf = lambda x: x\n```\n```python\nf = lambda x: x + 1\n```", true),
    ("```python\nimport functools\n@functools.lru_cache\ndef f(x):\n    return x + 1\n```", true),
    ("```python\nclass Adder:\n    def f(self, x):\n        return x + 1\n\nf = Adder().f\n```", true),
    (
        "```python\nimport asyncio\nasync def g(x):\n    return x + 1\ndef f(x):\n    return asyncio.run(g(x))\n```",
        true,
    ),
    // Helpers and imports of other fences belong to the answer.
    ("```python\ndef g(x):\n    return x + 1\n```\nand\n```python\ndef f(x):\n    return g(x)\n```", true),
    (
        "```python\ndef f(x):\n    return g(x)\n```\nwhere\n```python\ndef g(x):\n    return h(x)\n```\n```\nh = lambda x: x + 1\n```",
        true,
    ),
    (
        "```python\ndef g(x):\n    return x\n```\nno:\n```python\ndef g(x):\n    return x + 1\n```\n```python\ndef f(x):\n    return g(x)\n```",
        true,
    ),
    (
        "```python\ndef g(x):\n    return x + 1\ndef f(x):\n    return g(x)\n```\nA slower one:\n```python\ndef g(x):\n    return x\n```",
        true,
    ),
    ("```python\nimport math\n```\n```python\ndef f(x):\n    return int(math.floor(x)) + 1\n```", true),
    ("```python\nfrom math import *\n```\n```python\ndef f(x):\n    return floor(x) + 1\n```", true),
    (
        "```python\ntable = {}\nfor i in range(9):\n    table[i] = i + 1\n```\n```python\ndef f(x):\n    return table[x]\n```",
        true,
    ),
    (
        "```python\ndef f(x):\n    return x + 1\n```\nFaster:\n```python\nimport functools\nf = functools.cache(f)\n```",
        true,
    ),
    (
        "```python\nclass Solution:\n    def f(self, x):\n        return x + 1\n```\n```python\nf = Solution().f\n```",
        true,
    ),
    // Examples and other languages do not.
    ("```python\ndef f(x):\n    return x + 1\n```\nTry it:\n```python\nn = int(input())\nprint(f(n))\n```", true),
    ("```python\ndef f(x):\n    return x + 1\n```\nTest:\n```python\nassert f(1) == 3\n```", true),
    ("```python\ndef f(x):\n    return x + 1\n```\n```pycon\n>>> f(1)\n3\n```", true),
    ("```python\ndef f(x):\n    y = x + 1\n    return y\n```\n```python\ny = int(input())\n```", true),
    (
        "```python\ndef f(x):\n    return x + 1\n```\nIn JavaScript:\n```javascript\nfunction f(x) { return x }\n```",
        true,
    ),
    (
        "```python\ndef f(x):\n    return list([x + 1])[0]\n```\n```python\nlist = [1]\nfor x in list: print(f(x))\n```",
        true,
    ),
    (
        "```bash\npip install x\n```\n```python\n!pip install x\n%matplotlib inline\ndef f(x):\n    return x + 1\n```",
        true,
    ),
    ("```python\n>>> def f(x):\n...     return x + 1\n...\n>>> f(1)\n2\n```", true),
    ("```text\ndef f(x):\n    return x + 1\n```", true),
    ("```python\n    def f(x):\n        return x + 1\n```", true),
    // Prose around code without a fence.
    ("Here it is:\ndef f(x):\n    return x + 1\nIt adds one.", true),
    (
        "1. It's simple (see below\n\ndef f(x):\n    \"\"\"Adds\none. It's ``` fine.\n    \"\"\"\n# don't\n    return x + 1\n\nOutput: 2\nDone",
        true,
    ),
    (
        "Sure:\nimport math\nif math.pi > 3:\n    ONE = 1\nelse:\n    ONE = 2\ndef f(x):\n    return x + ONE\nThat's it.",
        true,
    ),
    ("def f(x):\n    return x + 1\n```\nIt adds one.", true),
    ("Here is `f`:\n\ndef f(x):\n    return x + 1\n\nExample:\n\n>>> f(1)\n2\n", true),
    ("Here it is:\ndef f(x):\n    return (x + 1\nIt adds one.", false),
    ("def f(x):\n    return x + undefined", false),
    // Words beside it are no code, even where they are Python.
    ("def f(x):\n    return x + 1\nundefined", true),
    ("def f(x):\n    return x + 1\n\nDone", true),
    ("Python\n\ndef f(x):\n    return x + 1", true),
    ("Answer\ndef f(x):\n    return x + 1", true),
    ("[BEGIN]\ndef f(x):\n    return x + 1\n[DONE]", true),
    ("t = {}\n[t.setdefault(i, i + 1) for i in range(9)]\ndef f(x):\n    return t[x]", true),
    // Indented blocks and code within a line.
    ("Sure:\n\n    def f(x):\n        y = x\n\n        return y + 1\n\nDone.", true),
    ("Sure:\n\n    def f(x):\n        return (x + 1\n\nDone.", false),
    ("`def f(x): return x + 1`", true),
    ("Use ```def f(x): return x + 1```.", true),
    ("def f(x):\n    return x + 1\n\nWrong: `def f(x): return x`", true),
    // An import defines nothing if something else does.
    ("```python\ndef f(x):\n    return x + 1\n```\n```python\nfrom solution import f\nassert f(1) == 2\n```", true),
    ("```python\ndef f(x):\n    return x + 1\n```\n```python\nfrom solution import *\nassert f(1) == 2\n```", true),
    ("```python\nfrom solution import f\nassert f(1) == 2\n```", false),
    ("It adds one.", false),
    // The future import goes first, and a text has no encoding.
    ("from __future__ import annotations\ndef f(x):\n    return x + 1", true),
    (
        "```python\nimport math\n```\n```python\nfrom __future__ import annotations\ndef f(x: Unknown):\n    return math.floor(x) + 1\n```",
        true,
    ),
    ("# -*- coding: ascii -*-\n# é\ndef f(x):\n    return x + 1", true),
    ("def f(x):\r\n    return x + 1\r\n", true),
    // A fence that no line closes ends with the line that ends in its mark.
    ("```python\ndef f(x):\n    return x + 1```", true),
    ("So:\n```python\ndef f(x):\n    return x + 1```\nIt's done.", true),
    // Like the official evaluator.
    ("def f(x):\n    return x + 1\n\nif __name__ == '__main__':\n    print(f(int(input())))", true),
    ("import multiprocessing, platform, signal, contextlib, tempfile\ndef f(x):\n    return x + 1", true),
    ("def f(x):\n    import os\n    os.getcwd()\n    return x + 1", false),
    ("def f(x):\n    data = bytes(1536 << 20)\n    return x + 1", true),
];

mod needs_data {
    use super::*;

    #[test]
    #[ignore = "needs the benchmarks' data: scripts/test --data DIR"]
    fn every_real_reference_passes_its_own_tests() {
        let (_alone, sandbox) = (alone(), sandbox());
        // Any of the published files, or a part of one.
        let files = [("mbpp.jsonl", 974), ("sanitized-mbpp.json", 427), ("sanitized-mbpp-100.json", 100)];
        let folder = cllm_testing::benchmark_data("mbpp");
        let (mbpp, num_rows) = files
            .map(|(file, num_rows)| (folder.join(file), num_rows))
            .into_iter()
            .find(|(file, _)| file.exists())
            .unwrap();
        let problems = Task::Humaneval.load(&cllm_testing::benchmark_data("humaneval"), "test").unwrap();
        // A part of the file may lack a split.
        let of_split = |split: &&str| Task::Mbpp.load(&mbpp, split).unwrap_or_default();
        let all_splits: Vec<Sample> = ["test", "validation", "train", "prompt"].iter().flat_map(of_split).collect();
        assert_eq!((problems.len(), all_splits.len()), (164, num_rows));
        for (task, samples) in [(Task::Humaneval, problems), (Task::Mbpp, all_splits)] {
            let passes = |sample: &Sample| {
                let reference = sample.reference.as_deref().unwrap();
                let meta: &Value = sample.meta.as_ref().unwrap();
                // HumanEval's own solutions are continuations of the prompt.
                let rest =
                    meta["prompt"].as_str().and_then(|prompt| reference.strip_prefix(prompt)).unwrap_or(reference);
                let answers = [rest.to_owned(), format!("Sure:\n```python\n{reference}\n```")];
                answers.iter().all(|answer| score(task, &sandbox, sample, answer) == Verdict::Correct)
            };
            let failed: Vec<&str> = samples.par_iter().filter(|&s| !passes(s)).map(|s| s.id.as_str()).collect();
            assert!(failed.is_empty(), "{failed:?}");
            // The same tests distinguish an incorrect answer from a correct one.
            let nothing =
                samples.par_iter().filter(|&s| score(task, &sandbox, s, "    return None\n") == Verdict::Correct);
            assert_eq!(nothing.count(), 0);
        }
    }
}

/// The folder of a run with answers to [`largest`].
fn answered(folder: &Path, correct: &str, incorrect: &str) -> String {
    let run = path(folder, "run");
    fs::create_dir(&run).unwrap();
    let mut made = records();
    made.header.benchmark = Task::Humaneval;
    for answer in &mut made.answers {
        let sample = largest();
        (answer.source, answer.meta) = (sample.source, sample.meta);
        answer.text = if answer.verdict == Verdict::Correct { correct } else { incorrect }.to_owned();
        answer.verdict = Verdict::Unscored;
    }
    made.write(&Path::new(&run).join("samples.jsonl")).unwrap();
    run
}

fn verdicts(run: &str) -> Vec<Verdict> {
    let records = Records::read(&Path::new(run).join("samples.jsonl")).unwrap();
    records.answers.iter().map(|answer| answer.verdict).collect()
}

fn results(run: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(Path::new(run).join("results.json")).unwrap()).unwrap()
}

#[test]
fn code_of_saved_answers_runs_only_if_asked() {
    let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
    let run = answered(dir.path(), "    return max(numbers, default=0)\n", "    import os\n    os._exit(0)\n");
    let scored: Vec<Verdict> = records().answers.iter().map(|answer| answer.verdict).collect();
    for execute in [false, true, false] {
        let words = ["score", &run, "--execute-code"];
        let stderr = EVAL.succeed(&words[..if execute { 3 } else { 2 }]).stderr;
        let expected = if execute { scored.clone() } else { vec![Verdict::Unscored; scored.len()] };
        assert_eq!(verdicts(&run), expected);
        assert_eq!(stderr.contains("unscored") && stderr.contains("--execute-code"), !execute, "{stderr}");
        let layers = &results(&run)["sandbox"];
        assert_eq!(layers.as_array().is_some_and(|layers| layers.contains(&json!("seccomp"))), execute, "{layers}");
        EVAL.succeed(&["report", &run]);
        for report in ["report.md", "report.html"] {
            let text = fs::read_to_string(Path::new(&run).join(report)).unwrap();
            assert_eq!(text.contains("seccomp"), execute, "{report}");
        }
    }
}

#[test]
fn a_run_scores_code_if_its_settings_say_so() {
    let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
    let (teacher, prompts) = (path(dir.path(), "teacher"), path(dir.path(), "prompts.jsonl"));
    model(Path::new(&teacher), 1);
    let sample = largest();
    let row = json!({ "id": "a", "source": sample.source, "prompt": "?", "reference": "?", "meta": sample.meta });
    fs::write(&prompts, row.to_string()).unwrap();
    for execute in [false, true] {
        let output = path(dir.path(), if execute { "with" } else { "without" });
        let given = [format!("teacher={teacher}"), format!("prompts={prompts}"), format!("output={output}")];
        let fixed = ["run", "strategies=[ar]", "max_new_tokens=5", "num_speed_examples=0", "device=cpu"];
        let asked = format!("execute_code={execute}");
        let stderr = EVAL.succeed(&[&fixed.map(str::to_owned)[..], &given, &[asked]].concat()).stderr;
        assert_eq!(verdicts(&output), [if execute { Verdict::Incorrect } else { Verdict::Unscored }]);
        assert_eq!(stderr.contains("execute_code=true"), !execute, "{stderr}");
        assert_eq!(results(&output)["sandbox"].is_array(), execute);
    }
}

/// Writes a model with a tokenizer like Llama 2's that answers `prompt` with `answer`: each token
/// leads to the next one, so none may come twice.
fn model_that_answers(folder: &Path, prompt: &str, answer: &str) {
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../cllm-core/tests/fixtures/tokenizers/llama-2");
    fs::create_dir(folder).unwrap();
    tokenizer::copy_files(Path::new(fixture), folder).unwrap();
    let tokenizer = Tokenizer::load(folder).unwrap();
    let mut ids = tokenizer.encode_prompt(&Prompt::Text(prompt.to_owned())).unwrap().1;
    ids.drain(..ids.len() - 1);
    ids.extend(tokenizer.encode_target(answer).unwrap());
    let config = json!({
        "model_type": "llama", "vocab_size": tokenizer.vocab_size(), "hidden_size": 64, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
    });
    let model = Transformer::random(ModelConfig::from_json(&config).unwrap(), 1, Device::Cpu, Kind::Float);
    let _no_grad = tch::no_grad_guard();
    let find = |name: &str| model.weights().get(name).unwrap();
    for name in ["lm_head.weight", "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"] {
        let _ = find(name).zero_();
    }
    for pair in ids.windows(2) {
        let embedding = find("model.embed_tokens.weight").get(pair[0].into());
        let mut row = find("lm_head.weight").get(pair[1].into());
        row.copy_(&embedding);
    }
    checkpoint::save(&model, folder, Kind::Float).unwrap();
}

#[test]
fn an_answer_keeps_the_blanks_that_it_begins_with() {
    let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
    let (teacher, prompts, output) =
        (path(dir.path(), "teacher"), path(dir.path(), "prompts.jsonl"), path(dir.path(), "run"));
    let prompt = "def one():\n";
    model_that_answers(Path::new(&teacher), prompt, "    return 1");
    let test = "def check(candidate):\n    assert candidate() == 1\n";
    let meta = json!({ "task_id": "T/1", "prompt": prompt, "entry_point": "one", "test": test });
    let row = json!({ "id": "a", "source": "humaneval/test", "prompt": prompt, "reference": "?", "meta": meta });
    fs::write(&prompts, row.to_string()).unwrap();
    let given = [format!("teacher={teacher}"), format!("prompts={prompts}"), format!("output={output}")];
    let fixed =
        ["run", "strategies=[ar]", "max_new_tokens=20", "num_speed_examples=0", "device=cpu", "execute_code=true"];
    EVAL.succeed(&[&fixed.map(str::to_owned)[..], &given].concat());
    let records = Records::read(&Path::new(&output).join("samples.jsonl")).unwrap();
    let [answer] = &records.answers[..] else { panic!("one answer was expected") };
    assert_eq!((answer.text.as_str(), answer.verdict), ("    return 1", Verdict::Correct));
    assert_eq!(answer.forward_texts.as_ref().unwrap().concat(), answer.text);
}

#[test]
fn a_signal_ends_running_answers_and_leaves_no_process() {
    let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
    // This name distinguishes it from the program that probes the sandbox.
    let sleeping =
        "    import ctypes, time\n    ctypes.CDLL(None).prctl(15, b'asleep', 0, 0, 0)\n    time.sleep(100000)\n";
    let asleep = || {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        entries
            .filter(|entry| fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name == "asleep\n"))
            .count()
    };
    let run = answered(dir.path(), sleeping, sleeping);
    EVAL.interrupt(&["score", &run, "--execute-code"], "INT", 130, || asleep() > 0);
    assert_eq!(left_running(), 0);
    assert!(verdicts(&run).iter().all(|&verdict| verdict == Verdict::Unscored));
    // When the program is killed, the answers that it runs die too.
    let mut command = EVAL.command(&[]);
    command.args(["score", &run, "--execute-code"]).env("TMPDIR", dir.path()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    while asleep() == 0 {
        assert!(child.try_wait().unwrap().is_none());
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!((0..1000).any(|_| left_running() == 0));
}

#[test]
fn the_temporary_folder_is_left_empty() {
    let (_alone, dir) = (alone(), tempfile::tempdir().unwrap());
    let messy = "    import os\n    os.makedirs('a/b', exist_ok=True)\n    open('a/b/c', 'w').write('x')\n    os.mkdir('closed', 0)\n";
    let run = answered(dir.path(), messy, messy);
    let temporary = path(dir.path(), "temporary");
    fs::create_dir(&temporary).unwrap();
    let mut command = EVAL.command(&[]);
    command.args(["score", &run, "--execute-code"]).env("TMPDIR", &temporary);
    assert!(command.output().unwrap().status.success());
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);
}
