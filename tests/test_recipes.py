"""The published recipes, and train.py's flags: what is refused, and what a checkpoint remembers of them."""
import math

import pytest

from lib.recipes import RECIPES, parse, replace, settings


def test_the_published_recipe_is_what_the_stages_say():
    def chosen(cfg):
        return cfg.train, cfg.global_batch, cfg.lr, cfg.template, cfg.image_mode
    assert chosen(parse([])) == chosen(parse(["--stage", "pretrain"])) == ("projector", 256, 1e-3, "plain", "crop")
    cfg = parse(["--stage", "finetune"])
    assert chosen(cfg) == ("projector,llm,vision", 128, 2e-5, "v0", "pad")
    assert (cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay, cfg.grad_clip, cfg.warmup) == (0.9, 0.98, 1e-7, 0, 1, 0.03)
    cfg = parse(["--recipe", "mipha", "--stage=finetune"])
    assert (cfg.epochs, cfg.beta2, cfg.eps, cfg.model, cfg.image_mode) == (2, 0.999, 1e-8, "out/mipha-pretrain", "pad")


@pytest.mark.parametrize("flags, alpha, lr, projector_lr, vision_lr", [
    ("--stage finetune", 16, 2e-5, 0, 0),
    ("--stage finetune --lora-r 0", 16, 2e-5, 0, 0),
    ("--stage finetune --lora-r 64", 128, 2e-4, 2e-5, 2e-5),
    ("--stage finetune --lora-r=8 --base-bits 4", 16, 2e-4, 2e-5, 2e-5),
    ("--recipe mipha --stage finetune --lora-r 8", 16, 2e-4, 2e-5, 2e-5),
    ("--stage pretrain --lora-r 4", 8, 2e-4, 1e-3, 1e-3),
    ("--stage sft --lora-r 4", 8, 2e-4, 3e-5, 3e-5),
    ("--lora-alpha 16 --stage finetune --lora-r 64", 16, 2e-4, 2e-5, 2e-5),
    ("--stage finetune --lora-r 64 --lr 1e-3 --projector-lr 5e-4 --vision-lr 1e-6", 128, 1e-3, 5e-4, 1e-6),
    ("--stage finetune --projector-lr 0 --lora-r 64", 128, 2e-4, 0, 2e-5),
])
def test_adapters_bring_llavas_own_recipe_for_them(flags, alpha, lr, projector_lr, vision_lr):
    """A scale of 2, and 2e-4; what is trained whole keeps the stage's rate, and a flag that is given comes first."""
    cfg = parse(flags.split())
    assert (cfg.lora_alpha, cfg.lr, cfg.projector_lr, cfg.vision_lr) == (alpha, lr, projector_lr, vision_lr)


def test_every_flag_has_a_default_in_every_stage():
    """Protects a run from a flag that one row of the recipes forgot, which would be None in the middle of it."""
    for recipe, stages in RECIPES.items():
        for stage in stages:
            cfg = parse(["--recipe", recipe, "--stage", stage])
            assert [name for name, value in vars(cfg).items() if value is None] == ["track", "plot", "against"]


def test_help_shows_the_defaults_of_the_stage_and_recipe_it_is_asked_for(capsys):
    for flags, default in ((["--stage", "finetune"], "2e-05"), (["--stage", "sft"], "3e-05"),
                           (["--stage", "finetune", "--lora-r", "8"], "0.0002")):
        with pytest.raises(SystemExit):
            parse([*flags, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert f"peak learning rate (default: {default})" in said and f"those of --stage {flags[1]}" in said
        assert ("--recipe llava-phi --lora-r 8." in said) == ("--lora-r" in flags)


@pytest.mark.parametrize("args, words", [
    (["--stage", "middle"], "--stage: invalid choice: 'middle'"),
    (["--recipe", "mipha", "--stage", "sft"], "--recipe mipha has no --stage sft"),
    (["--lerning-rate", "1"], "unrecognized arguments: --lerning-rate"),
    (["--global-batch", "0"], "--global-batch: expected a whole number of at least 1, found 0"),
    (["--epochs", "0"], "--epochs: expected a number of at least 1e-06, found 0"),
    (["--plot-to", "x.html"], "--plot-to x.html needs --plot, with the --out folders of runs"),
    (["--keep", "1.5"], "--keep: expected a whole number of at least 1, found 1.5"),
    (["--lr", "nan"], "--lr: expected a number of at least 0.0, found nan"),
    (["--lr", "inf"], "--lr: expected a number of at least 0.0, found inf"),
    (["--dropout", "2"], "--dropout: expected a number of at least -1.0 and at most 0.99, found 2"),
    (["--gpus", "0"], "--gpus: expected a whole number of at least 1, found 0"),
    (["--dtype", "fp16"], "fp16: expected fp32 or bf16; .* overflow in fp16"),
    (["--gather", "weights"], "--gather: invalid choice: 'weights'"),
    (["--stage", "finetune", "--llm", "demo/phi"], "--model out/pretrain has one already"),
    (["--stage", "sft", "--model", "x"], "--stage sft trains just a language model"),
    (["--compile", "--recompute", "selective"], "give --recompute none or full"),
    (["--base-bits", "8", "--lora-r", "4"], "--base-bits: invalid choice: 8"),
    (["--base-bits", "4"], "--base-bits 4 needs --lora-r"),
    (["--base-bits", "4", "--lora-r", "4", "--lora-on", "attn"], "--base-bits 4 needs --lora-r .* --lora-on both"),
    (["--base-bits", "4", "--lora-r", "4", "--compile"], "does not work with --compile"),
])
def test_flags_that_make_no_sense_are_refused_in_one_line(args, words):
    with pytest.raises(ValueError, match=words) as refused:
        parse(args)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_remembers_the_run_and_not_what_was_asked_for_instead():
    cfg = parse(["--stage", "finetune", "--plan", "--gpus", "4"])
    assert settings(cfg) == settings(parse(["--stage", "finetune"]))
    assert not settings(cfg).keys() & {"plan", "plot", "gpus", "gpus_per_node", "gpu", "gpu_memory", "tflops"}
    other = replace(cfg, lr=math.pi)
    assert (other.lr, cfg.lr) == (math.pi, 2e-5) and settings(other) | {"lr": 2e-5} == settings(cfg)
