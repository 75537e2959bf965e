import { createHash } from "node:crypto";
import { open, readdir } from "node:fs/promises";
import { join } from "node:path";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import type { CallOptions as ConnectCallOptions, Client } from "@connectrpc/connect";
import {
  type AdapterService,
  UploadAdapterRequestSchema,
  type UploadAdapterRequest,
  type UploadAdapterResponse,
  type UploadHeaderSchema,
} from "./gen/manyhats/v1/adapter_pb.js";
import { setTask } from "./interceptors.js";

export const CONFIG_FILE = "adapter_config.json";
export const WEIGHTS_SUFFIX = ".safetensors";
/** AdapterHub's head: its tensors and what describes them. */
export const HEAD_FILES = ["model_head.safetensors", "head_config.json"] as const;
export const TEXT_FILES = [
  "added_tokens.json",
  "chat_template.jinja",
  "special_tokens_map.json",
  "tokenizer.json",
  "tokenizer_config.json",
] as const;
const CHUNK_BYTES = 1024 * 1024;
// In the server's initial metadata, once it accepts the header.
const ACCEPTED = "manyhats-upload";

/** What an upload may say besides the files; and a function that is called with the bytes sent and their total. */
export type UploadOptions = Omit<MessageInitShape<typeof UploadHeaderSchema>, "taskId" | "files" | "$typeName"> & {
  progress?: (sent: number, total: number) => void;
};

interface UploadFile {
  path: string;
  name: string;
  sizeBytes: number;
  sha256: string;
}

/** Sends a directory's adapter; see `ManyhatsClient.upload`. */
export async function uploadDirectory(
  client: Client<typeof AdapterService>,
  taskId: string,
  directory: string,
  options: UploadOptions,
  callOptions: ConnectCallOptions,
): Promise<UploadAdapterResponse> {
  const { progress, ...fields } = options;
  const files = await readFiles(directory);
  const header = {
    ...fields,
    taskId,
    files: files.map(({ name, sizeBytes, sha256 }) => ({ name, sizeBytes: BigInt(sizeBytes), sha256 })),
  };
  const headers = new Headers();
  setTask(headers, header);
  let goOn: () => void = () => {};
  const accepted = new Promise<void>((resolve) => (goOn = resolve));
  try {
    const messages = messagesOf(header, files, accepted, progress);
    return await client.uploadAdapter(messages, {
      ...callOptions,
      headers,
      onHeader: (answered) => answered.has(ACCEPTED) && goOn(),
    });
  } finally {
    goOn(); // so that nothing waits for ever if the server refused
  }
}

/** The adapter's files in a directory, hashed: its configs, safetensors and text files; nothing else is sent. */
async function readFiles(directory: string): Promise<UploadFile[]> {
  const entries = await readdir(directory, { withFileTypes: true });
  const names = entries.filter((entry) => entry.isFile()).map((entry) => entry.name).sort();
  const weights = names.filter((name) => name.endsWith(WEIGHTS_SUFFIX));
  if (!names.includes(CONFIG_FILE) || weights.length === 0) {
    throw new Error(`${directory} must have ${CONFIG_FILE} and a ${WEIGHTS_SUFFIX} file`);
  }
  const others: string[] = TEXT_FILES.filter((name) => names.includes(name));
  if (HEAD_FILES.every((name) => names.includes(name))) {
    others.push(HEAD_FILES[1]);
  }
  return Promise.all([CONFIG_FILE, ...weights, ...others].map((name) => readOne(directory, name)));
}

async function readOne(directory: string, name: string): Promise<UploadFile> {
  const path = join(directory, name);
  const hash = createHash("sha256");
  let sizeBytes = 0;
  for await (const chunk of chunksOf(path)) {
    hash.update(chunk);
    sizeBytes += chunk.length;
  }
  return { path, name, sizeBytes, sha256: hash.digest("hex") };
}

async function* chunksOf(path: string): AsyncGenerator<Uint8Array> {
  const file = await open(path);
  try {
    for (;;) {
      const { bytesRead, buffer } = await file.read(new Uint8Array(CHUNK_BYTES), 0, CHUNK_BYTES);
      if (bytesRead === 0) {
        return;
      }
      yield buffer.subarray(0, bytesRead);
    }
  } finally {
    await file.close();
  }
}

/** The header, and once the server accepts it, every file in chunks. */
async function* messagesOf(
  header: MessageInitShape<typeof UploadHeaderSchema>,
  files: UploadFile[],
  accepted: Promise<void>,
  progress: UploadOptions["progress"],
): AsyncGenerator<UploadAdapterRequest> {
  yield create(UploadAdapterRequestSchema, { content: { case: "header", value: header } });
  await accepted;
  const total = files.reduce((sum, file) => sum + file.sizeBytes, 0);
  let sent = 0;
  for (const [fileIndex, { path, sizeBytes }] of files.entries()) {
    let offset = 0;
    for await (const data of chunksOf(path)) {
      yield create(UploadAdapterRequestSchema, {
        content: { case: "chunk", value: { fileIndex, offset: BigInt(offset), data } },
      });
      offset += data.length;
      progress?.((sent += data.length), total);
    }
    if (offset !== sizeBytes) {
      throw new Error(`${path} changed while it was sent`);
    }
  }
}
