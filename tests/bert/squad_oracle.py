"""SQuAD's rules, written apart from the package: its evaluation scripts, and parts of google-research/bert's."""

import collections
import re
import string
from collections.abc import Sequence


def normalize_answer(s: str) -> str:
    """The same in `evaluate-v1.1.py` and `evaluate-v2.0.py`."""

    def remove_articles(text: str) -> str:
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def white_space_fix(text: str) -> str:
        return " ".join(text.split())

    def remove_punc(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    def lower(text: str) -> str:
        return text.lower()

    return white_space_fix(remove_articles(remove_punc(lower(s))))


def f1_version_1(prediction: str, ground_truth: str) -> float:
    prediction_tokens = normalize_answer(prediction).split()
    ground_truth_tokens = normalize_answer(ground_truth).split()
    common = collections.Counter(prediction_tokens) & collections.Counter(ground_truth_tokens)
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(prediction_tokens)
    recall = 1.0 * num_same / len(ground_truth_tokens)
    return (2 * precision * recall) / (precision + recall)


def f1_version_2(a_gold: str, a_pred: str) -> float:
    gold_toks = normalize_answer(a_gold).split() if a_gold else []
    pred_toks = normalize_answer(a_pred).split() if a_pred else []
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        # If either is no-answer, then F1 is 1 if they agree, 0 otherwise
        return int(gold_toks == pred_toks)
    return f1_version_1(a_pred, a_gold)


def evaluate_version_1(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    f1 = exact_match = 0.0
    for prediction, ground_truths in zip(predictions, answers, strict=True):
        exact_match += max(normalize_answer(prediction) == normalize_answer(g) for g in ground_truths)
        f1 += max(f1_version_1(prediction, g) for g in ground_truths)
    total = len(predictions)
    return {"exact": exact_match / total, "f1": f1 / total}


def evaluate_version_2(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    exact_scores, f1_scores = {}, {}
    for qid, (a_pred, given) in enumerate(zip(predictions, answers, strict=True)):
        gold_answers = [a for a in given if normalize_answer(a)]
        if not gold_answers:
            # For unanswerable questions, only correct answer is empty string
            gold_answers = [""]
        exact_scores[qid] = max(int(normalize_answer(a) == normalize_answer(a_pred)) for a in gold_answers)
        f1_scores[qid] = max(f1_version_2(a, a_pred) for a in gold_answers)
    has_ans_qids = [qid for qid, given in enumerate(answers) if given]
    no_ans_qids = [qid for qid, given in enumerate(answers) if not given]
    out = {}
    for prefix, qids in (("", list(exact_scores)), ("HasAns_", has_ans_qids), ("NoAns_", no_ans_qids)):
        for name, found in (("exact", exact_scores), ("f1", f1_scores)):
            if qids:
                out[prefix + name] = sum(found[k] for k in qids) / len(qids)
    return out


def doc_spans(all_doc_tokens: int, max_tokens_for_doc: int, doc_stride: int) -> list[tuple[int, int]]:
    """[(start, length)] of the windows, as in `run_squad.py`."""
    spans = []
    start_offset = 0
    while start_offset < all_doc_tokens:
        length = all_doc_tokens - start_offset
        length = min(length, max_tokens_for_doc)
        spans.append((start_offset, length))
        if start_offset + length == all_doc_tokens:
            break
        start_offset += min(length, doc_stride)
    return spans


def check_is_max_context(spans: Sequence[tuple[int, int]], cur_span_index: int, position: int) -> bool:
    best_score = None
    best_span_index = None
    for span_index, (start, length) in enumerate(spans):
        end = start + length - 1
        if position < start or position > end:
            continue
        num_left_context = position - start
        num_right_context = end - position
        score = min(num_left_context, num_right_context) + 0.01 * length
        if best_score is None or score > best_score:
            best_score = score
            best_span_index = span_index
    return cur_span_index == best_span_index
