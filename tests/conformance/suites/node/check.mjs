// npm's openai package on this server: chat, streams, completions, models, errors. Ends at the first difference.

import assert from "node:assert/strict";
import OpenAI from "openai";

const { CONFORMANCE_URL: baseURL, CONFORMANCE_MODEL: model, CONFORMANCE_TASK: task } = process.env;
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello." }];
const asked = { model, messages, max_tokens: 12, temperature: 1, seed: 5 };

const checks = {
  async chat() {
    const answer = await client.chat.completions.create({ ...asked, logprobs: true, top_logprobs: 2 });
    const [choice] = answer.choices;
    assert.equal(choice.message.role, "assistant");
    assert.ok(["stop", "length"].includes(choice.finish_reason));
    assert.equal(choice.logprobs.content.length, answer.usage.completion_tokens);
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
    assert.ok(answer._request_id);
  },

  async stream() {
    const whole = await client.chat.completions.create(asked);
    let [text, reason, usage] = ["", null, null];
    const options = { ...asked, stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await client.chat.completions.create(options)) {
      text += chunk.choices[0]?.delta.content ?? "";
      reason ??= chunk.choices[0]?.finish_reason;
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(reason, whole.choices[0].finish_reason);
    assert.deepEqual(usage.completion_tokens, whole.usage.completion_tokens);
  },

  async "the package's own collector of a stream"() {
    const runner = client.chat.completions.stream(asked);
    const whole = await client.chat.completions.create(asked);
    assert.equal(await runner.finalContent(), whole.choices[0].message.content);
  },

  async "a stream that is left"() {
    const stream = await client.chat.completions.create({ ...asked, max_tokens: 500, stream: true });
    for await (const chunk of stream) {
      assert.ok(chunk.choices);
      break;
    }
    assert.ok(stream.controller.signal.aborted);
  },

  async completions() {
    const prompt = ["The cat", "The dog"];
    const answer = await client.completions.create({ model, prompt, max_tokens: 4, echo: true, logprobs: 1 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
    answer.choices.forEach((choice) => {
      assert.ok(choice.text.startsWith(prompt[choice.index]));
      assert.equal(choice.logprobs.token_logprobs[0], null);
    });
    let text = "";
    const asked = { model, prompt: "The cat", max_tokens: 4, temperature: 0 };
    for await (const chunk of await client.completions.create({ ...asked, stream: true })) {
      text += chunk.choices[0].text;
    }
    assert.equal(text, (await client.completions.create(asked)).choices[0].text);
  },

  async embeddings() {
    const answer = await client.embeddings.create({ model, input: ["a cat", "a dog"] });
    assert.deepEqual(answer.data.map((each) => each.index), [0, 1]);
    for (const { embedding } of answer.data) {
      assert.ok(Math.abs(Math.hypot(...embedding) - 1) < 1e-5);
    }
    const { data } = await client.embeddings.create({ model, input: "a cat", encoding_format: "float" });
    assert.deepEqual(data[0].embedding.map(Math.fround), answer.data[0].embedding);
  },

  async models() {
    const ids = [];
    for await (const each of client.models.list()) {
      ids.push(each.id);
    }
    assert.equal(ids[0], model);
    assert.ok(ids.includes(task));
    assert.equal((await client.models.retrieve(`${task}@1`)).parent, model);
  },

  async "a task as a model"() {
    const { data, response } = await client.chat.completions.create({ ...asked, model: task }).withResponse();
    assert.equal(data.model, task);
    assert.equal(response.headers.get("x-manyhats-version"), `${task}@1`);
  },

  async errors() {
    const refused = async (kind, fields, expected) => {
      await assert.rejects(client.chat.completions.create({ ...asked, ...fields }), (error) => {
        assert.ok(error instanceof kind, `${error.constructor.name}: ${error.message}`);
        assert.deepEqual({ code: error.code, param: error.param }, expected);
        return true;
      });
    };
    await refused(OpenAI.NotFoundError, { model: "none" }, { code: "model_not_found", param: "model" });
    await refused(OpenAI.BadRequestError, { top_p: 2 }, { code: "invalid_value", param: "top_p" });
    await refused(OpenAI.BadRequestError, { nonsense: 1 }, { code: "invalid_value", param: "nonsense" });
    await refused(OpenAI.BadRequestError, { messages: [] }, { code: "invalid_value", param: "messages" });
    await refused(OpenAI.BadRequestError, { stream: true, n: 99 }, { code: "invalid_value", param: "n" });
    await assert.rejects(client.images.generate({ model, prompt: "a" }), OpenAI.NotFoundError);
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(`${name}: as it should be`);
}
