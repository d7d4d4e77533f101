"""Where other people's programs ask models of ours; each file here belongs to one of them, and imports it."""


def lmms_eval_models():
    """What lmms-eval's entry point `lmms_eval.models` loads: our model's name, and the classes that answer for it.

    The harness turns whatever fails here into a warning, and leaves out all other plug-ins with it. So nothing of
    ours is imported but this file; a fault of the classes is raised when one of them is asked for by its name.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="lmm_jax",
        simple_class_path="lmm_jax.integrations.lmms_eval.SimpleModel",
        chat_class_path="lmm_jax.integrations.lmms_eval.ChatModel",
    )
