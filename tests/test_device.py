import torch

from lmlosses import cpu_generator, default_device


def test_the_default_device_is_cuda_where_there_is_one(monkeypatch):
    monkeypatch.delenv("LMLOSSES_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_device() == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


def test_the_environment_overrides_the_choice_of_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LMLOSSES_DEVICE", "cpu")
    assert default_device() == torch.device("cpu")
    monkeypatch.setenv("LMLOSSES_DEVICE", "cuda:1")
    assert default_device() == torch.device("cuda", 1)


def test_an_empty_override_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LMLOSSES_DEVICE", "")
    assert default_device() == torch.device("cpu")


def test_a_generator_repeats_its_seed_and_no_other():
    drawn = [torch.rand(4, generator=cpu_generator(seed)) for seed in (7, 7, 8)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_generator_stays_on_the_cpu_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    generator = cpu_generator(0)
    torch.rand(4, generator=generator)
    assert generator.device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), before)
