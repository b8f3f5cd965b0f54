"""Runs exported language models with numpy and onnxruntime alone.

::

    from fairseq_lightrnn.runtime.model import ExportedModel

    model = ExportedModel.load("on-device")
    print(model.score("the cat sat on the mat").perplexity)
    print(model.next_words("the cat sat on the", 5))
    print(model.complete("the cat sat on the m", 5))
"""
