from basd.components.losses import LOSSES, LossesConfig, enabled_losses


def test_registry() -> None:
    assert set(vars(LossesConfig())) == set(LOSSES)
    config = LossesConfig()
    assert enabled_losses(config) == ()
    config.spectral.enabled = config.rsd.enabled = True
    assert enabled_losses(config) == ("rsd", "spectral")
