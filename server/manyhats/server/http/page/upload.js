// Sending an adapter's files.

import { headers, refusal, unreachable } from "./api.js";
import { $, problem, show } from "./dom.js";

// onDone(text): a version was made.
export function uploads(onDone) {
  let sending = null;
  const dialog = $("upload-dialog");

  $("upload-open").addEventListener("click", () => {
    problem($("upload-problem"), null);
    dialog.showModal();
  });
  $("upload-cancel").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => sending?.abort());
  $("upload-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (sending) return;
    problem($("upload-problem"), null);
    const form = new FormData();
    form.append("options", JSON.stringify({ activate: $("upload-activate").checked }));
    for (const file of $("upload-files").files) form.append("file", file, file.name);
    sending = new XMLHttpRequest();
    $("upload-send").disabled = true;
    try {
      const { adapter, created } = await sent(sending, $("upload-task").value.trim(), form);
      dialog.close();
      $("upload-form").reset();
      const name = `${adapter.taskId}@${adapter.version}`;
      onDone(created ? `${name} is registered.` : `${name} is the same already.`);
    } catch (error) {
      if (dialog.open) problem($("upload-problem"), error);
    } finally {
      sending = null;
      $("upload-send").disabled = false;
      show($("upload-progress"), false);
    }
  });
}

// By XMLHttpRequest, since fetch does not say how much has been sent.
function sent(request, task, form) {
  return new Promise((resolve, reject) => {
    request.open("PUT", `/v1/tasks/${encodeURIComponent(task)}/upload`);
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", ({ loaded, total }) => {
      show($("upload-progress"));
      $("upload-progress").value = loaded / total;
    });
    request.addEventListener("load", () => {
      const isGood = request.status === 200;
      if (isGood) resolve(JSON.parse(request.responseText));
      else reject(refusal(request.status, request.responseText));
    });
    request.addEventListener("error", () => reject(unreachable()));
    request.addEventListener("abort", () => reject(new Error("The upload was stopped.")));
    request.send(form);
  });
}
