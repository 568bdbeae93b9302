"""Every benchmark on tiny data in its official layout, with answers and their score, worked out by hand."""
import base64
import io
import json
from pathlib import Path

from PIL import Image

import eval as ev
from benchmarks import mmbench, pope, scoring, vizwiz


def evaluate(flags: list[str]) -> None:
    """The command, in this process."""
    ev.main(ev.parse(flags))


def picture(path: Path, color: tuple[int, int, int] = (200, 60, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), color).save(path, "PNG" if path.suffix == ".png" else "JPEG")
    return path


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl" or isinstance(value, list) and "coco_pope" in path.name:
        path.write_text("".join(json.dumps(row) + "\n" for row in value))
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value))


def make_vqav2(root: Path) -> None:
    names = [picture(root / f"vqav2/test2015/COCO_test2015_{i:012d}.jpg").name for i in (1, 2)]
    rows = [{"question_id": 10 * i, "image": name, "text": f"Is it red?\n{scoring.SHORT}", "category": "default"}
            for i, name in enumerate(names, 1)]
    write(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    write(root / "vqav2/llava_vqav2_mscoco_test2015.jsonl", rows + [{**rows[0], "question_id": 30}])


def make_vqav2_val(root: Path) -> None:
    picture(root / "vqav2/val2014/COCO_val2014_000000000007.jpg")
    questions = [{"image_id": 7, "question": "How many?", "question_id": 70},
                 {"image_id": 7, "question": "Is it red?", "question_id": 71}]
    humans = [["2"] * 3 + ["3"] * 7, ["yes"] * 10]
    write(root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(root / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": [
        {"question_id": q["question_id"], "answer_type": kind,
         "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(answers, 1)]}
        for q, answers, kind in zip(questions, humans, ["number", "yes/no"])]})


def make_gqa(root: Path) -> None:
    picture(root / "gqa/data/images/n1.jpg")
    row = {"imageId": "n1", "types": {"structural": "verify", "semantic": "attr"}, "isBalanced": True}
    write(root / "gqa/data/testdev_balanced_questions.json", {
        "201": {**row, "question": "Is it foggy?", "answer": "yes"},
        "202": {**row, "question": "Is it wet?", "answer": "no"},
        "203": {**row, "question": "What is it?", "answer": "car",
                "types": {"structural": "query", "semantic": "obj"}}})


def make_vizwiz(root: Path) -> None:
    picture(root / "vizwiz/test/VizWiz_test_00000000.jpg")
    write(root / "vizwiz/Annotations/test.json",
          [{"image": "VizWiz_test_00000000.jpg", "question": "what COLOR is it?"}])


def make_vizwiz_val(root: Path) -> None:
    picture(root / "vizwiz/val/VizWiz_val_00000000.jpg")
    answers = [{"answer": "Black", "answer_confidence": "yes"}] * 10
    write(root / "vizwiz/val.json", [{"image": "VizWiz_val_00000000.jpg", "question": "color?", "answers": answers,
                                      "answer_type": "other",
                                      "answerable": 1}])


def make_scienceqa(root: Path) -> None:
    picture(root / "scienceqa/images/test/5/image.png")
    problem = {"question": "Which is  it?", "choices": ["one", "two"], "answer": 1, "hint": "", "image": None,
               "subject": "natural science", "grade": "grade3"}
    write(root / "scienceqa/problems.json", {"5": {**problem, "image": "image.png", "hint": "Look."}, "6": problem,
                                             "8": {**problem, "subject": "language science", "grade": "grade8"}})
    write(root / "scienceqa/pid_splits.json", {"test": ["5", "6", "8"]})


def make_textvqa(root: Path) -> None:
    """Two questions about one picture, so that question_id repeats; no OCR tokens for the second picture."""
    for name in ("aa", "bb"):
        picture(root / f"textvqa/train_images/{name}.jpg")
    rows = [("aa", "What BRAND is it?", "acme"), ("aa", "what year?", "1999"), ("bb", "what word?", "stop")]
    write(root / "textvqa/TextVQA_0.5.1_val.json", {"data": [
        {"question": q, "question_id": i, "image_id": image, "answers": [answer] * 10}
        for i, (image, q, answer) in enumerate(rows)]})
    tokens = {"aa": "ACME, 1999", "bb": ""}
    write(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", [
        {"question_id": image, "image": f"{image}.jpg",
         "text": f"{q.capitalize()}\nReference OCR token: {tokens[image]}\n{scoring.SHORT}"}
        for image, q, _ in rows])


def make_pope(root: Path, kinds: tuple[str, ...] = ("adversarial", "popular", "random")) -> None:
    name = picture(root / "pope/val2014/COCO_val2014_000000310196.jpg").name
    rows = []
    for kind in kinds:
        labels = [{"question_id": i, "image": name, "text": f"Is there a {thing} in the image?", "label": label}
                  for i, (thing, label) in enumerate([("dog", "yes"), ("cat", "no")], 1)]
        # HEAD has another order
        write(root / f"pope/coco/coco_pope_{kind}.json", labels[::-1] if kind == "random" else labels)
        rows += [{"question_id": r["question_id"] + pope.OFFSETS[kind], "image": name, "category": kind,
                  "text": r["text"].replace("image?", "imange?" if kind == "popular" else "image?")
                  + f"\n{scoring.SHORT}"} for r in labels]
    write(root / "pope/llava_pope_test.jsonl", rows)


def make_mme(root: Path) -> None:
    release = root / "MME/MME_Benchmark_release_version"
    picture(release / "artwork/images/1.jpg")
    picture(release / "OCR/2.png")
    write(release / "artwork/questions_answers_YN/1.txt",
          "Is it old?  Please answer yes or no.\tYes\nIs it new? Please answer yes or no.\tNo\n")
    write(release / "OCR/2.txt", "".join(f'Is it "{animal}"? Please answer yes or no.\t{answer}\n'
                                         for animal, answer in [("cat", "Yes"), ("dog", "No")]))


def mmbench_rows(folder: Path, name: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (0, 0, 255)).save(buffer, "JPEG")
    image = base64.b64encode(buffer.getvalue()).decode()
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
               "comment", "split"]
    same = {"C": "", "D": "nan", "category": "object", "source": "x", "l2-category": "coarse_perception",
            "comment": "", "split": "dev"}
    first = {**same, "question": 'Which "one"?\nSay.', "hint": "Look"}
    table = [{**first, "index": "5", "A": "cat", "B": "dog", "answer": "A", "image": image},
             # an image given by another row's index
             {**first, "index": "1000005", "A": "dog", "B": "cat", "answer": "B", "image": "5"},
             {**same, "index": "6", "question": "Second?", "hint": "nan", "A": "x", "B": "y", "answer": "B",
              "image": image}]
    rows = [columns] + [[row[column] for column in columns] for row in table]
    quote = lambda cell: '"' + cell.replace('"', '""') + '"' if set(cell) & set('"\n\t') else cell
    write(folder / name, "".join("\t".join(map(quote, row)) + "\n" for row in rows))


def make_mmvet(root: Path) -> None:
    picture(root / "mm-vet/images/v1_0.png")
    row = {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"],
           "imagesource": "here"}
    write(root / "mm-vet/mm-vet.json", {"v1_0": row, "v1_1": {**row, "question": "What is y?", "capability": ["rec"]}})


def make_seedbench(root: Path) -> None:
    (root / "seed_bench/SEED-Bench-image").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(root / "seed_bench/SEED-Bench-image/14_29", "JPEG")
    row = {"answer": "A", "choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four",
           "data_type": "image", "data_id": "14_29",
           "question": "How many?", "question_type_id": 5}
    write(root / "seed_bench/SEED-Bench.json", {"question_type": {"Instances Counting": 5, "Action": 10}, "questions": [
        {**row, "question_id": "101"}, {**row, "question_id": "102", "answer": "B"},
        {**row, "question_id": "v9", "data_type": "video", "data_id": "clip", "question_type_id": 10}]})


def make_llavabench(root: Path) -> None:
    folder = root / "llava-bench-in-the-wild"
    picture(folder / "images/001.jpg")
    write(folder / "questions.jsonl",
          [{"question_id": i, "image": "001.jpg", "category": kind, "text": f"Question {i}?"}
                                       for i, kind in enumerate(["conv", "detail"])])
    write(folder / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A red picture."}])
    write(folder / "answers_gpt4.jsonl", [{"question_id": i, "text": f"Reference {i}"} for i in range(2)])


def make_mmmu(root: Path) -> None:
    picture(root / "mmmu/images/a.png")
    row = {"image_1": "a.png", "question": "See <image 1>?", "options": "['apple', 'it\\'s']", "answer": "B",
           "question_type": "multiple-choice"}
    write(root / "mmmu/val.jsonl", [{**row, "id": "validation_Accounting_1"},
                                    {**row, "id": "validation_Art_Theory_2", "question_type": "open", "options": "[]",
                                     "answer": "12"}])


def make_shapes(root: Path) -> None:
    picture(root / "shapes/images/0.png")
    row = {"image": "0.png", "text": "Which colour?", "category": "colour", "chance": 0.25}
    write(root / "shapes/questions.jsonl", [{**row, "question_id": 0, "answer": "red"},
                                            {**row, "question_id": 1, "text": "How many?", "answer": "1",
                                             "category": "count", "chance": 0.5}])


class Case:
    """A task on tiny data: what makes it, answers in the order of its rows, and the headline they earn (by hand)."""
    def __init__(self, make, answers, value, *flags, prompts=(), numbers=None, submission=None):
        self.make, self.answers, self.value, self.flags = make, answers, value, flags
        self.prompts, self.numbers, self.submission = dict(prompts), numbers or {}, submission


CASES = {
    "vqav2": Case(make_vqav2, ["Yes.", "a girl's hat"], None, prompts={0: f"Is it red?\n{scoring.SHORT}"},
                  submission="vqav2_test-dev2015.json"),
    "vqav2-val": Case(make_vqav2_val, ["two", "Yes"], 95.0, "--split", "val", numbers={"number": 90, "yes/no": 100}),
    "gqa": Case(make_gqa, ["Yes", "no ", "Car."], 200 / 3, numbers={"binary": 50, "open": 100},
                prompts={0: f"Is it foggy?\n{scoring.SHORT}"},
                submission="testdev_balanced_predictions.json"),
    "vizwiz": Case(make_vizwiz, ["A Black cat"], None,
                   prompts={0: f"What color is it?\n{vizwiz.UNANSWERABLE}\n{scoring.SHORT}"},
                   submission="vizwiz_test.json"),
    "vizwiz-val": Case(make_vizwiz_val, ["Black"], 100.0, "--split", "val", numbers={"official VQA scorer": 0}),
    "scienceqa": Case(make_scienceqa, ["B", "A", "The answer is B."], 100.0,
                      numbers={"all": 200 / 3, "NO": 50, "G7-12": 100},
                      prompts={0: f"Context: Look.\nWhich is it?\nA. one\nB. two\n{scoring.LETTER}",
                               1: f"Which is it?\nA. one\nB. two\n{scoring.LETTER}"}),
    "textvqa": Case(make_textvqa, ["Acme", "2000", "the stop"], 200 / 3,
                    prompts={0: f"What brand is it?\nReference OCR token: ACME, 1999\n{scoring.SHORT}",
                             2: f"What word?\nReference OCR token: \n{scoring.SHORT}"}),
    "textvqa-no-ocr": Case(make_textvqa, ["Acme", "1999", ""], 200 / 3, "--no-ocr",
                           prompts={0: f"What brand is it?\n{scoring.SHORT}"}),
    "pope": Case(make_pope, ["Yes", "No", "No", "no", "Yes", "Yes"], 100 * (1 + 0 + 2 / 3) / 3,
                 numbers={"accuracy": 400 / 6, "popular F1": 0},
                 prompts={0: f"Is there a dog in the image?\n{scoring.SHORT}"}),
    "mme": Case(make_mme, ["Yes", "No", "No", "no"], 200 + 50, numbers={"artwork": 200, "OCR": 50, "cognition": 0},
                prompts={0: f"Is it old?\n{scoring.SHORT}"}),
    "mmbench": Case(lambda root: mmbench_rows(root / "mmbench", "mmbench_dev_20230712.tsv"), ["A", "B", "A"], 50.0,
                    numbers={"single pass": 50, "CP": 50}, submission="mmbench.xlsx",
                    prompts={0: f'Look\nWhich "one"?\nSay.\nA. cat\nB. dog\n{scoring.LETTER}',
                             2: f"Second?\nA. x\nB. y\n{scoring.LETTER}"}),
    "mmbench_cn": Case(lambda root: mmbench_rows(root / "mmbench", "mmbench_dev_cn_20231003.tsv"), ["A", "A", "B"],
                       50.0,
                       prompts={2: f"Second?\nA. x\nB. y\n{mmbench.LETTER_CN}"}, submission="mmbench.xlsx"),
    "mmvet": Case(make_mmvet, ["-1", "no idea"], None, prompts={0: "What is x?"}, submission="mm-vet.json"),
    "seedbench": Case(make_seedbench, ["A", "b"], 50.0, numbers={"Instances Counting": 50},
                      submission="seed_bench.jsonl",
                      prompts={0: f"How many?\nA. One\nB. Two\nC. Three\nD. Four\n{scoring.LETTER}"}),
    "llavabench": Case(make_llavabench, ["x", "y"], None, prompts={0: "Question 0?"}),
    "mmmu": Case(make_mmmu, ["(B)", "it is 12.0"], 100.0, numbers={"Business": 100, "Art_Theory": 100},
                 submission="mmmu.json",
                 prompts={0: f"See <image 1>?\n(A) apple\n(B) it's\n\n{scoring.LETTER}",
                          1: f"See <image 1>?\n{scoring.SHORT}"}),
    "shapes": Case(make_shapes, ["Red.", "red", "2", "1"], 50.0,
                   numbers={"chance": 37.5, "blank image": 100, "colour": 100, "count": 0}),
}


def prepare(name: str, root: Path) -> tuple[list[str], ev.Data]:
    """-> flags of the task, and its data."""
    case = CASES[name]
    case.make(root)
    flags = ["--task", name.split("-")[0], "--root", str(root), *case.flags]
    return flags, ev.load_data(name.split("-")[0], ev.parse(flags))


def llava_file(path: Path, data: ev.Data, answers: list[str]) -> Path:
    """As LLaVA's scripts write it: no rows, and further fields."""
    write(path, [{"question_id": e.question_id, "prompt": e.info.get("saved", e.prompt), "text": text,
                  "answer_id": "x", "model_id": "m", "metadata": {}}
                 for e, text in zip(data.examples, answers)])
    return path
