"""Heuristic defences under attack over the course of training (Balunovic et al. 2022, section 6).

    python benchmarks/papers/course_of_training.py --json course.json --figures FOLDER
    python benchmarks/papers/course_of_training.py --dataset mnist --data-dir DATA --model cnn

Trains under each defence and attacks the same victims at 0, 1, 2, 5, ..., 1000 steps of Adam, by an attack
that does not know the defence and by those that do. The published claim: a heuristic defence that holds late
in training may not hold early. Against ATS, the PSNR is given against the image that the gradient was taken
of, too.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import timing

from invjax import attacks, datasets, defenses, models
from invjax.attacks import first_dense, objectives
from invjax.evaluation import course
from invjax.report.course import course_figure

POLICY = "3-1-7+43-18-18"


def naive(model, steps: int, weights=None):
    """Inverting Gradients (Geiping et al. 2020), perhaps with weights of the gradient's parts."""
    objective = objectives.cosine(weights)
    return attacks.inverting_gradients(
        model, objective=objective, total_variation=1e-4, num_steps=steps
    )


def kept(model, steps: int):
    """Inverting Gradients on the entries that are not zero: what a mask has left."""
    whole = objectives.cosine()

    def value(candidate, observation):
        left = jax.tree.map(
            lambda mine, theirs: jnp.where(theirs == 0, 0.0, mine),
            candidate,
            observation.gradient,
        )
        return whole.value(left, observation)

    return attacks.inverting_gradients(
        model, objective=whole._replace(value=value), total_variation=1e-4, num_steps=steps
    )


def experiments(make, shape, steps: int):
    """For each defence: the model trained, the defence, and attacks by name."""
    plain = make(10)
    params = plain.init(jax.random.key(0), shape)
    soteria = defenses.soteria(plain, 0.8)
    drop = defenses.drop_layer_weights(plain, params)
    yield "none", plain, None, {"cosine": naive(plain, steps)}
    yield (
        "soteria(0.8)",
        plain,
        soteria,
        {
            "naive cosine": naive(plain, steps),
            "layer dropped": naive(plain, steps, drop),
            "cosine, kept rows": kept(plain, steps),
            "bayes (kept rows)": attacks.bayes(plain, soteria, num_steps=steps),
        },
    )
    yield (
        f"ats({POLICY})",
        plain,
        defenses.ats(POLICY),
        {"cosine": naive(plain, steps)},
    )
    body = make(64)
    protected = defenses.precode(body, 10, bottleneck=32)
    params = protected.init(jax.random.key(0), shape)
    guess = protected.at(jax.random.key(9))
    known = {
        "naive, own noise": naive(guess, steps),
        "stochastic part omitted": naive(guess, steps, defenses.omit_stochastic_weights(params)),
    }
    if make is MODELS["mlp"]:
        known["first-layer quotient"] = attacks.bias_trick(
            protected.mean(), first=lambda tree: first_dense(body, tree["body"])
        )
    yield "precode", protected, None, known


MODELS = {
    "mlp": lambda classes: models.mlp((128, 64), classes),
    "cnn": models.cnn,
}


def main() -> None:
    """Train, attack, draw."""
    parser = timing.parser(__doc__, data_dir=True)
    parser.add_argument("--dataset", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--victims", type=int, default=8)
    parser.add_argument("--attack-steps", type=int, default=600)
    parser.add_argument("--figures", help="folder for a figure a defence")
    options = parser.parse_args()
    data = datasets.load(options.dataset, options.data_dir)
    rows = []
    for title, model, defense, known in experiments(
        MODELS[options.model], data.input_shape, options.attack_steps
    ):
        measured = course.attack_over_training(
            model, data, defense, known, num_victims=options.victims
        )
        for name in known:
            for column in ("psnr", "prepared_psnr") if title.startswith("ats") else ("psnr",):
                row = {
                    "defense": title,
                    "attack": name,
                    "PSNR against": "private" if column == "psnr" else "prepared",
                }
                for step in course.STEPS:
                    values = [
                        min(one[column], 150.0)
                        for one in measured
                        if one["attack"] == name and one["step"] == step
                    ]
                    row[str(step)] = round(float(np.mean(values)), 1)
                rows.append(row)
                print(row, flush=True)
        if options.figures:
            folder = pathlib.Path(options.figures)
            folder.mkdir(parents=True, exist_ok=True)
            name = title.partition("(")[0]
            (folder / f"{name}.png").write_bytes(course_figure(measured))
    print("\n" + timing.table(rows))
    timing.write(options.json, rows, benchmark="papers/course_of_training")


if __name__ == "__main__":
    main()
